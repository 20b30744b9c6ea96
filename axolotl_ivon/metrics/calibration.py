"""Temperature scaling of predictions: one number, fitted on held-out data (Guo et al. 2017, arXiv 1706.04599).

The softmax temperature T of an output, p_T(y) ∝ p(y)^(1/T), is another thing than the temperature τ of a posterior. It
is the baseline that costs nothing at prediction time. As few examples tell little about it, a T that is recommended is
the most probable one under a prior (`SPREAD`), and it is taken if examples gain by the T of the others:
benchmarks/fidelity/NOTES.md, 22.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .choice import cross_validated
from .scores import Scores

TEMPERATURES = (0.01, 100.0)  # the limits of what is fitted
# Where distributions over a vocabulary are not kept, T is one of these. An NLL is flat near its minimum, so they are
# close enough. From 0.35 to 4; 1 is among them.
TEMPERATURE_GRID = tuple(round(2 ** (k / 6), 4) for k in range(-9, 13))
SPREAD = 0.3  # of log T before any example is seen, a standard deviation around T = 1


def rescale(probabilities: Tensor, temperature: float) -> Tensor:
    """Return distributions (n, classes) with their log-probabilities divided by `temperature`."""
    return (logs_of(probabilities) / temperature).softmax(-1)


def scores_at(
    temperature: float, probabilities: Tensor, target: Tensor, group: Tensor, averaged: bool, keep: bool = True
) -> Scores:
    """Score distributions (n, classes) at a temperature; how far `averaged` draws disagree is then unknown, NaN."""
    unknown = torch.full((len(target),), math.nan) if averaged else None
    return Scores.of(rescale(probabilities, temperature), target, unknown, group, unknown, keep)


def nll_at_temperatures(logs: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of p ∝ exp(logs/T) for each of TEMPERATURE_GRID, (n, k, T) in float64.

    Args:
        logs: log-probabilities or logits, (n, classes).
        targets: k classes of each, (n, k).
    """
    own = logs.gather(1, targets)
    return torch.stack([(logs / t).logsumexp(-1, keepdim=True) - own / t for t in TEMPERATURE_GRID], -1).double()


def penalty(temperature: float) -> float:
    """Return minus the logarithm of T's prior density, in nats: 0 for T = 1."""
    return (math.log(temperature) / SPREAD) ** 2 / 2


PENALTIES = np.array([penalty(temperature) for temperature in TEMPERATURE_GRID])


def added_by_a_temperature(losses: np.ndarray) -> float:
    """Return how much the NLL of all examples changes if each gets the T fitted to the others; below 0, T helps.

    It is in nats, summed over the examples.

    Args:
        losses: NLL of the examples, summed over their labels, at each of TEMPERATURE_GRID, (examples, T).
    """
    return cross_validated(losses, PENALTIES, TEMPERATURE_GRID.index(1.0))


def probable_temperature(probabilities: Tensor, target: Tensor) -> float:
    """Return the temperature with the least NLL of `target` (n,) by distributions (n, classes), plus `penalty`."""
    from scipy.optimize import minimize_scalar

    logs = logs_of(probabilities)

    def cost(log: float) -> float:
        nll = torch.nn.functional.cross_entropy(logs / math.exp(log), target.to(logs.device), reduction="sum")
        return float(nll) + penalty(math.exp(log))

    coldest, hottest = map(math.log, TEMPERATURES)
    step = 0.1  # far from 1 the cost may fall once more
    start = min((coldest + step * k for k in range(round((hottest - coldest) / step) + 1)), key=cost)
    return math.exp(minimize_scalar(cost, bounds=(start - step, start + step), method="bounded").x)


def fit_temperature(probabilities: Tensor, target: Tensor) -> float:
    """Return the temperature at which distributions (n, classes) give `target` (n,) the least NLL.

    The NLL is convex in 1/T: its derivative, E_T[log p(y)] − log p(target) averaged over n, rises, and its zero is
    found between the limits `TEMPERATURES`. Where there is none the nearer limit is returned.
    """
    from scipy.optimize import brentq

    logs = logs_of(probabilities)
    away = logs - logs.gather(1, target.to(logs.device)[:, None])

    def slope(inverse: float) -> float:
        return ((away * inverse).softmax(-1) * away).sum(-1).mean(dtype=torch.float64).item()

    coldest, hottest = TEMPERATURES
    if slope(1 / coldest) <= 0:
        return coldest
    if slope(1 / hottest) >= 0:
        return hottest
    return 1 / brentq(slope, 1 / hottest, 1 / coldest)


def logs_of(probabilities: Tensor) -> Tensor:
    """Return the logarithms of probabilities, the smallest number's of those that are 0."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
