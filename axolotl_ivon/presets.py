"""What an unset γ, λ, clip and learning rate are: the paper's values, or a rule for little data and few steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from .errors import IVONError
from .optimizer import effective_sample_size


class Preset(NamedTuple):
    """Settings that go together.

    Attributes:
        gamma: γ of λ = γ·√N; None where λ is a multiple of N.
        ess_per_example: λ/N; None where λ has γ.
        clip: ξ.
        travel: Σ α_t·ξ, the farthest that a weight can get in a run, which the learning rate is chosen for; None to
            take the learning rate that is given.
    """

    gamma: float | None
    ess_per_example: float | None
    clip: float
    travel: float | None

    def ess(self, train_size: int) -> float:
        """Return λ for N training examples.

        Raises:
            ValueError: `train_size` is not positive.
        """
        by_gamma = effective_sample_size(train_size, self.gamma or 1.0)
        return by_gamma if self.ess_per_example is None else self.ess_per_example * train_size


PRESETS = {
    # arXiv 2506.14280, commonsense reasoning
    "paper": Preset(gamma=5000.0, ess_per_example=None, clip=5e-3, travel=None),
    # benchmarks/RESULTS.md; the paper's 5,000 steps have a travel of 0.13
    "small_data": Preset(gamma=None, ess_per_example=10.0, clip=1e-2, travel=0.15),
}


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        IVONError: there is none of that name.
    """
    if name not in PRESETS:
        raise IVONError(f"preset: {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def rates(scheduler: Any, lr: float, steps: int) -> list[float]:
    """Return the learning rate of every step, or its bound where the scheduler is no function of the step."""
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        return [lr] * steps
    return [lr * lambdas[0](step) for step in range(steps)]
