"""The learning rate of every step of a run, and the peak that lets its weights travel a given distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD


def rates(scheduler: Any, lr: float, steps: int) -> list[float]:
    """Return the learning rate of every step, or its bound where the scheduler is no function of the step."""
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        return [lr] * steps
    return [lr * lambdas[0](step) for step in range(steps)]


def rate_for(travel: float, clip: float, steps: int, schedule: Callable[[float, SGD], Any]) -> float:
    """Return the peak learning rate at which a weight can travel Σ α_t·ξ = `travel` under a schedule.

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
