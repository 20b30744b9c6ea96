"""Findings about a run: whether its weights moved, and whether σ was learned."""

from __future__ import annotations

from typing import NamedTuple

from ..settings.presets import MEMORY

# A weight can travel at most Σ α_t·ξ in a run. The paper's commonsense runs allow 0.13; a run that allowed 0.04
# learned nothing.
SHORT_REACH, PAPER_REACH = 0.08, 0.13
# A run whose weights moved less on average has learned next to nothing: B begins at 0, and with r = 8 it then changes
# the output of a layer by a third of a percent.
HARDLY_MOVED = 1e-3
# Share of the allowed distance from which nearly all steps went in one direction: the end was not reached.
STILL_GOING = 0.6
# The spread of log σ within a tensor begins at 0. Below the first σ was not learned, from the second it was.
FROZEN, LEARNED = 0.02, 0.1


class Finding(NamedTuple):
    """One finding about a run.

    Attributes:
        about: "weights", "sigma" or "draws".
        good: True if nothing need be done.
        text: the finding, and what to do.
    """

    about: str
    good: bool
    text: str


def remembers_too_long(beta2: float, steps: int) -> bool:
    """Return whether p remembers more steps than it should in a run of `steps`, so that it hardly leaves its start."""
    return 1 / (1 - beta2) > 1.01 * steps * MEMORY  # a preset's β2 is at the limit


def travel_finding(travel: float, lr: float, by_hand: bool) -> Finding:
    """Return the finding on whether weights can travel far enough, Σ α_t·ξ; a rate set `by_hand` must allow more."""
    text, short = f"in this run a weight can move by {travel:.3g} at most", by_hand and travel < SHORT_REACH
    if travel < HARDLY_MOVED and not by_hand:
        text, short = f"{text}, so next to nothing can be learned: train longer, or raise learning_rate", True
    elif short:
        text += f", and below {SHORT_REACH} a run may learn little: train longer, or raise learning_rate"
        text += f" (with {lr * PAPER_REACH / travel:.2g} it is {PAPER_REACH}, as in the paper)" if travel else ""
    return Finding("weights", not short, text)


def findings(
    moved: float | None,
    allowed: float | None,
    spread: float | None,
    steps: int,
    beta2: float | None,
    *,
    inherited: bool = False,
) -> list[Finding]:
    """Return findings about the weights and σ.

    Args:
        moved: the average distance |m − start| of a weight of a B matrix; None if unknown.
        allowed: the largest distance that the learning rate allowed, Σ α_t·ξ; None if unknown.
        spread: the standard deviation of log σ within a tensor, averaged over weights; None without draws.
        steps: of the run; 0 if unknown.
        beta2: β2; None if unknown.
        inherited: whether σ began as that of an earlier adapter, and its spread with it.
    """
    weights = [] if moved is None else [_weights_finding(moved, allowed)]
    return weights if spread is None else [*weights, _sigma_finding(spread, steps, beta2, inherited)]


def _weights_finding(moved: float, allowed: float | None) -> Finding:
    share = f", {moved / allowed:.0%} of the {allowed:.3g} that the learning rate allowed" if allowed else ""
    if moved < HARDLY_MOVED:
        little = allowed is not None and allowed < 10 * HARDLY_MOVED
        cure = "raise the learning rate or train longer" if little else "if the loss does not fall, λ may be too small"
        return Finding("weights", False, f"the weights have hardly moved: by {moved:.1g} on average{share}; {cure}")
    text = f"the weights moved: by {moved:.2g} on average{share}"
    if allowed and moved > STILL_GOING * allowed:
        text += "; they were still on their way: a longer run or a larger learning rate would take them farther"
    return Finding("weights", True, text)


def _sigma_finding(spread: float, steps: int, beta2: float | None, inherited: bool) -> Finding:
    differs = f"within a tensor it differs by {spread:.1%} from weight to weight"
    if spread >= FROZEN:
        learned = "σ was learned" if spread >= LEARNED else "σ has begun to be learned"
        began = "σ began as the earlier adapter's; what this run learned is on top of that"
        return Finding("sigma", True, began if inherited else f"{learned}: {differs}")
    text = f"σ was not learned: {differs}"
    if beta2 is not None and 0 <= beta2 < 1 < steps * MEMORY and remembers_too_long(beta2, steps):
        text += f"; β2 = {beta2:g} remembers {1 / (1 - beta2):,.0f} steps and the run had {steps:,}"
        text += f", so try β2 = {1 - 1 / (steps * MEMORY):.3g}"
    return Finding("sigma", False, f"{text}; |m|/σ ranks weights nearly as |m| does")


def begins_at_zero(name: str) -> bool:
    """Return whether a weight is of a matrix that PEFT starts at 0 by default: B, and of an embedding A."""
    return ".lora_B" in name or ".lora_embedding_A" in name
