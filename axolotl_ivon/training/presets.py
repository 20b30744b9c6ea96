"""What an unset γ, λ, clip and learning rate are: the paper's values, or a rule for little data and few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import SGD

from ..defaults import DEFAULTS
from ..optim.ivon import effective_sample_size

# A weight can travel at most Σ α_t·ξ in a run. The paper's commonsense runs allow 0.13; a run that allowed 0.04
# learned nothing.
SHORT_REACH, PAPER_REACH = 0.08, 0.13


class Preset(NamedTuple):
    """Settings that go together.

    Attributes:
        gamma: γ of λ = γ·√N; None where λ is a multiple of N.
        ess_per_example: λ/N where there is no γ.
        noise: the most that the draws of a run's beginning may add up to, Σ σ²/var(A) over all LoRA matrices A. It
            bounds λ from below where there is no γ, since the disturbances of several layers add up.
        clip: ξ.
        travel: Σ α_t·ξ, the farthest that a weight can get in a run, which the learning rate is chosen for; None to
            take the learning rate that is given.
    """

    gamma: float | None
    clip: float
    travel: float | None
    ess_per_example: float = 0.0
    noise: float = math.inf

    def ess(self, train_size: int, h0: float, fan_ins: Sequence[int]) -> float:
        """Return λ for N training examples and LoRA matrices A with so many inputs each.

        Raises:
            ValueError: `train_size` is not positive.
        """
        ess = effective_sample_size(train_size, 1.0 if self.gamma is None else self.gamma)
        if self.gamma is not None or not h0 > 0:  # the optimizer refuses such an h0
            return ess
        # PEFT's A has variance 1/(3·inputs) at the start, and σ² is 1/(λ·h0) there.
        return max(self.ess_per_example * train_size, 3 * sum(fan_ins) / (h0 * self.noise))


PRESETS = {
    "paper": Preset(gamma=DEFAULTS.gamma, clip=DEFAULTS.clip, travel=None),
    # benchmarks/RESULTS.md. The paper's runs have the same travel, and noise of 20 to 80.
    "small_data": Preset(gamma=None, clip=1e-2, travel=0.125, ess_per_example=10.0, noise=64.0),
}


def rates(scheduler: Any, lr: float, steps: int) -> list[float]:
    """Return the learning rate of every step, or its bound where the scheduler is no function of the step."""
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        return [lr] * steps
    return [lr * lambdas[0](step) for step in range(steps)]


def rate_for(travel: float, clip: float, steps: int, schedule: Callable[[float, SGD], Any]) -> float:
    """Return the peak learning rate with which a weight can travel so far, Σ α_t·ξ, under a schedule.

    `schedule(lr, optimizer)` makes a scheduler of this peak; it is called with optimizers that train nothing. A
    scheduler that asks for more than the step is taken to stay at the peak.
    """

    def total(lr: float) -> float:
        optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler, sum_of_rates = schedule(lr, optimizer), 0.0
        for _ in range(steps):
            sum_of_rates += optimizer.param_groups[0]["lr"]
            optimizer.step()
            try:
                scheduler.step()
            except TypeError:  # it wants the loss
                return lr * steps
        return sum_of_rates

    before, lr = 0.0, 1.0
    for _ in range(20):  # one round is enough, except for schedules with an absolute floor
        if math.isclose(before, lr, rel_tol=1e-6):
            break
        before, lr = lr, lr * travel / clip / (total(lr) or 1.0)
    return lr
