"""The learning rate of every step of a run, and the peak that lets its weights travel a given distance."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import SGD

# Options of a schedule that are rates, and not shares of its peak.
_ABSOLUTE = ("min_lr", "max_lr", "lr_end", "eps")


def scaled_options(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the options of a schedule (`lr_scheduler_kwargs`) with every rate among them times `factor`."""

    def scaled(value: Any) -> Any:
        return [scaled(one) for one in value] if isinstance(value, list | tuple) else float(value) * factor

    return {name: scaled(x) if name in _ABSOLUTE and x is not None else x for name, x in options.items()}


def rates(scheduler: Any, steps: int) -> list[float]:
    """Return the learning rate of every step of a schedule that has not begun.

    A copy is stepped. A schedule that asks for more than the step is taken to stay where it is.
    """
    optimizer = _untrained(1.0)
    (group,) = optimizer.param_groups
    optimizer.param_groups = [
        {**group, **other, "params": group["params"]} for other in scheduler.optimizer.param_groups
    ]
    return _stepped(copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer}), optimizer, steps)


def rate_for(travel: float, clip: float, steps: int, schedule: Callable[[float, SGD], Any]) -> float:
    """Return the peak learning rate at which a weight can travel Σ α_t·ξ = `travel` under a schedule.

    `schedule(lr, optimizer)` makes a scheduler of this peak; it is called with optimizers that train nothing.
    """

    def total(lr: float) -> float:
        optimizer = _untrained(lr)
        return sum(_stepped(schedule(lr, optimizer), optimizer, steps))

    before, lr = 0.0, 1.0
    for _ in range(20):  # one round is enough, except for schedules with an absolute floor
        if math.isclose(before, lr, rel_tol=1e-6):
            break
        before, lr = lr, lr * travel / clip / (total(lr) or 1.0)
    return lr


def _untrained(lr: float) -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def _stepped(scheduler: Any, optimizer: SGD, steps: int) -> list[float]:
    """Return the rates of the optimizer while its scheduler is stepped."""
    rates_so_far = [float(optimizer.param_groups[0]["lr"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch takes a copied optimizer for one whose step was overridden
        while len(rates_so_far) < steps:
            optimizer.step()
            try:
                scheduler.step()
            except TypeError:  # it wants the loss
                return rates_so_far + rates_so_far[-1:] * (steps - len(rates_so_far))
            rates_so_far.append(float(optimizer.param_groups[0]["lr"]))
    return rates_so_far
