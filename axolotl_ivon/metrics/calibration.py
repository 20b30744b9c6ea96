"""Temperature scaling of predictions: one number, fitted on held-out data (Guo et al. 2017, arXiv 1706.04599).

The softmax temperature T of an output, p_T(y) ∝ p(y)^(1/T), is another thing than the temperature τ of a posterior. It
is the baseline that costs nothing at prediction time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scores import Scores

TEMPERATURES = (0.01, 100.0)  # the limits of what is fitted
# Where distributions over a vocabulary are not kept, T is one of these. An NLL is flat near its minimum, so they are
# close enough. From 0.35 to 4; 1 is among them.
TEMPERATURE_GRID = tuple(round(2 ** (k / 6), 4) for k in range(-9, 13))


def rescale(probabilities: Tensor, temperature: float) -> Tensor:
    """Return distributions (n, classes) with their log-probabilities divided by `temperature`."""
    return (_log(probabilities) / temperature).softmax(-1)


def scores_at(
    temperature: float, probabilities: Tensor, target: Tensor, group: Tensor, averaged: bool, keep: bool = True
) -> Scores:
    """Score distributions (n, classes) at a temperature; how far `averaged` draws disagree is then unknown, NaN."""
    unknown = torch.full((len(target),), math.nan) if averaged else None
    return Scores.of(rescale(probabilities, temperature), target, unknown, group, unknown, keep)


def fit_temperature(probabilities: Tensor, target: Tensor) -> float:
    """Return the temperature at which distributions (n, classes) give `target` (n,) the least NLL.

    The NLL is convex in 1/T: its derivative, E_T[log p(y)] − log p(target) averaged over n, rises, and its zero is
    found between the limits `TEMPERATURES`. Where there is none the nearer limit is returned.
    """
    from scipy.optimize import brentq

    logs = _log(probabilities)
    away = logs - logs.gather(1, target.to(logs.device)[:, None])

    def slope(inverse: float) -> float:
        return ((away * inverse).softmax(-1) * away).sum(-1).mean(dtype=torch.float64).item()

    coldest, hottest = TEMPERATURES
    if slope(1 / coldest) <= 0:
        return coldest
    if slope(1 / hottest) >= 0:
        return hottest
    return 1 / brentq(slope, 1 / hottest, 1 / coldest)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
