"""What is said of a run, from what it did: whether its weights moved and whether σ was learned."""

from __future__ import annotations

from typing import NamedTuple

from ..settings.presets import MEMORY

# A run whose weights moved by less on average has learned next to nothing: B begins at 0, and with r = 8 it then
# changes what a layer gives by a third of a percent.
HARDLY_MOVED = 1e-3
# Of the way that the learning rate allowed: nearly all steps went in one direction, so the end was not reached.
STILL_GOING = 0.6
# The spread of log σ within a tensor, which begins at 0: σ that is where it began, and σ that was learned.
FROZEN, LEARNED = 0.02, 0.1


class Finding(NamedTuple):
    """One thing that is said of a run.

    Attributes:
        about: "weights", "sigma" or "draws".
        good: whether nothing need be done.
        text: what is found, and what to do.
    """

    about: str
    good: bool
    text: str


def remembers_too_long(beta2: float, steps: int) -> bool:
    """Return whether p hardly leaves its start in a run of so many steps."""
    return 1 / (1 - beta2) > 1.01 * steps * MEMORY  # a preset's β2 is at the limit


def findings(
    moved: float | None, allowed: float | None, spread: float | None, steps: int, beta2: float | None
) -> list[Finding]:
    """Return what is to be said of the weights and of σ.

    Args:
        moved: how far a weight of a B matrix moved on average, |m − start|; None where nobody knows.
        allowed: how far it could have moved, Σ α_t·ξ; None where nobody knows.
        spread: the standard deviation of log σ within a tensor, averaged over weights; None without draws.
        steps: of the run, 0 where nobody knows.
        beta2: β2, None where nobody knows.
    """
    found = []
    if moved is not None:
        share = f", {moved / allowed:.0%} of the {allowed:.3g} that the learning rate allowed" if allowed else ""
        if moved < HARDLY_MOVED:
            little = allowed is not None and allowed < 10 * HARDLY_MOVED
            cure = (
                "raise the learning rate or train longer" if little else "if the loss does not fall, λ may be too small"
            )
            text = f"the weights have hardly moved: by {moved:.1g} on average{share}; {cure}"
        else:
            text = f"the weights moved: by {moved:.2g} on average{share}"
            if allowed and moved > STILL_GOING * allowed:
                text += "; they were still on their way: a longer run or a larger learning rate would take them farther"
        found.append(Finding("weights", moved >= HARDLY_MOVED, text))
    if spread is None:
        return found
    differs = f"within a tensor it differs by {spread:.1%} from weight to weight"
    if spread >= FROZEN:
        learned = "σ was learned" if spread >= LEARNED else "σ has begun to be learned"
        found.append(Finding("sigma", True, f"{learned}: {differs}"))
        return found
    text = f"σ was not learned: {differs}"
    if beta2 is not None and 0 <= beta2 < 1 < steps * MEMORY and remembers_too_long(beta2, steps):
        text += f"; β2 = {beta2:g} remembers {1 / (1 - beta2):,.0f} steps and the run had {steps:,}"
        text += f", so try β2 = {1 - 1 / (steps * MEMORY):.3g}"
    found.append(Finding("sigma", False, f"{text}; |m|/σ ranks weights nearly as |m| does"))
    return found


def begins_at_zero(name: str) -> bool:
    """Whether a weight is one of a B matrix, which PEFT starts at 0 unless it is told otherwise."""
    return ".lora_B" in name or ".lora_embedding_B" in name
