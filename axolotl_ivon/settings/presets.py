"""What settings are that nobody gave: the paper's values, or a rule that fits them to the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .defaults import DEFAULTS

# A learning rate below this is one for AdamW: the most that a step may move a weight, and not IVON's α.
ADAM_LIKE_LR = 1e-3
# A weight can travel at most Σ α_t·ξ in a run. The paper's commonsense runs allow 0.13; a run that allowed 0.04
# learned nothing.
SHORT_REACH, PAPER_REACH = 0.08, 0.13
# Steps that p should remember, as a share of the run: benchmarks/fidelity/NOTES.md.
MEMORY = 0.2


def effective_sample_size(n: int, gamma: float = DEFAULTS.gamma) -> float:
    """Return λ = γ·√N, the effective sample size of IVON-LoRA (arXiv 2506.14280, section 3).

    Args:
        n: number of training examples N.
        gamma: γ; the paper's value for commonsense reasoning is 5000.

    Raises:
        ValueError: if `n` or `gamma` is not positive.
    """
    if not n > 0:
        raise ValueError(f"n must be a positive number of training examples, got {n}")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    return gamma * math.sqrt(n)


class Preset(NamedTuple):
    """Settings that go together.

    Attributes:
        gamma: γ of λ = γ·√N; None for λ = `per_example`·max(N, few)·max(1, weights/`usual_weights`). Where λ·h is
            far above the prior's precision, a draw raises the loss of an example by weights/(2·λ), so from the usual
            number of weights on this is the same for any.
        per_example, usual_weights: see `gamma`.
        few: what N counts as at least, in a run that passes `few_epochs[0]` times over the data or less, and in one
            that does `few_epochs[1]` times or more; in between it falls evenly. A short run learns too slowly among
            wide draws, and a long one overfits among narrow ones.
        few_epochs: see `few`.
        h0: initial Hessian; None for the one with which σ² is `noise` times the variance of LoRA matrices A at the
            start, but the sum of that over all of them not above `noise_in_all`, as the disturbances add up.
        noise, noise_in_all: see `h0`.
        clip: ξ.
        beta2: None for a memory of `memory`·steps.
        memory: see `beta2`.
        travel: Σ α_t·ξ, the farthest that a weight can get in a run, which the learning rate is chosen for where
            none is given; None to take what is given, as it is.
        prior_strength, hessian, h0_steps: as in `IVONLoRA`.
        posterior_strength: κ where the prior is a posterior. 1 is Bayes' rule. A diagonal posterior does not know what
            weights do together, and holds a task too weakly by two orders of magnitude.
    """

    gamma: float | None
    h0: float | None
    clip: float
    beta2: float | None
    travel: float | None
    prior_strength: float
    hessian: str
    h0_steps: float | None
    posterior_strength: float = 1.0
    per_example: float = 0.0
    few: tuple[int, int] = (0, 0)
    few_epochs: tuple[float, float] = (0.0, 1.0)
    usual_weights: float = math.inf
    noise: float = 0.0
    noise_in_all: float = 0.0
    memory: float = 0.0

    def ess(self, train_size: int, weights: int, epochs: float = 0.0) -> float:
        """Return λ for N training examples, so many LoRA weights, and so many passes over the examples.

        Raises:
            ValueError: `train_size` is not positive.
        """
        ess = effective_sample_size(train_size, 1.0 if self.gamma is None else self.gamma)
        if self.gamma is not None:
            return ess
        few = np.interp(epochs, self.few_epochs, self.few)
        return self.per_example * max(train_size, float(few)) * max(1.0, weights / self.usual_weights)

    def first_h0(self, ess: float, fan_ins: Sequence[int]) -> float:
        """Return h0 for LoRA matrices A with so many inputs each."""
        if self.h0 is not None:
            return self.h0
        # PEFT's A has variance 1/(3·inputs) at the start, and σ² is 1/(λ·h0) there.
        noise = min(self.noise_in_all, self.noise * len(fan_ins))
        return 3 * sum(fan_ins) / (ess * noise) if fan_ins else DEFAULTS.h0

    def second_beta(self, steps: int) -> float:
        """Return β2 for a run of so many steps."""
        if self.beta2 is not None:
            return self.beta2
        return 1 - min(0.1, 1 / max(1.0, self.memory * steps))


# benchmarks/fidelity/NOTES.md tells where the numbers are from.
AUTO = Preset(
    gamma=None,
    h0=None,
    clip=1e-2,
    beta2=None,
    travel=0.125,
    prior_strength=0.1,
    hessian="squared_gradients",
    h0_steps=10.0,
    posterior_strength=300.0,
    per_example=1000.0,
    few=(250, 125),
    few_epochs=(10.0, 20.0),
    usual_weights=1e5,
    noise=4.0,
    noise_in_all=64.0,
    memory=MEMORY,
)
PRESETS = {
    "auto": AUTO,
    "paper": Preset(
        gamma=DEFAULTS.gamma,
        h0=DEFAULTS.h0,
        clip=DEFAULTS.clip,
        beta2=DEFAULTS.betas[1],
        travel=None,
        prior_strength=DEFAULTS.prior_strength,
        hessian=DEFAULTS.hessian,
        h0_steps=DEFAULTS.h0_steps,
    ),
    "small_data": AUTO,
}
