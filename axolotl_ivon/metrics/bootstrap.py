"""Bootstrap standard errors of the metrics (Efron and Tibshirani 1993)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .scores import Scores, metrics, weighted_metrics
from .verdict import Paired

_CELLS = 1_000_000  # resamples × predictions that are held at a time: more would leave the cache


def bootstrap(scores: Scores, resamples: int = 1000) -> dict[str, Tensor]:
    """Return every metric under resampling, shape (resamples,) (Efron and Tibshirani 1993, algorithm 6.1).

    Examples are drawn with replacement, the same ones each time, so rows of one table are paired: the values of two
    rows may be subtracted.
    """
    groups, group = torch.unique(scores.group, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    step = max(1, _CELLS // max(len(group), len(groups)))
    parts: list[dict[str, Tensor]] = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = torch.randint(len(groups), (rows, len(groups)), generator=generator)
        times = torch.zeros(rows, len(groups), dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        parts.append(weighted_metrics(scores, times[:, group]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def standard_error(values: Tensor) -> float | None:
    """Return the standard deviation of what `bootstrap` gave; None without a value in two or more resamples."""
    values = values[values.isfinite()]
    error = values.std().item() if len(values) > 1 else math.inf
    return error if math.isfinite(error) else None


def differences(
    values: Mapping[str, float | None],
    other: Mapping[str, float | None],
    resamples: Mapping[str, Tensor],
    other_resamples: Mapping[str, Tensor],
) -> dict[str, Paired]:
    """Return, for every metric that both have, the difference of `values` to `other` and its error by `bootstrap`."""
    return {
        name: Paired(value - against, standard_error(resamples[name] - other_resamples[name]))
        for name, value in values.items()
        if value is not None and (against := other[name]) is not None
    }


def compare(scores: Scores, other: Scores) -> dict[str, Paired]:
    """Return the differences of all metrics to those of `other`, which has the same examples."""
    return differences(metrics(scores), metrics(other), bootstrap(scores), bootstrap(other))


def standard_errors(scores: Scores, resamples: int = 1000) -> dict[str, float | None]:
    """Return the bootstrap standard error of every metric; None where it has none."""
    return {name: standard_error(values) for name, values in bootstrap(scores, resamples).items()}
