"""What a paired difference means: whether it is more than noise, in numbers and in words.

Two standard errors side by side hide the answer: both predictions are wrong about the same examples. The bootstrap
draws the same examples for both, and the spread of the difference counts (Efron and Tibshirani 1993, chapter 8).

Importing this module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What every other variant is compared with, where it is evaluated.
REFERENCES = ("mean", "base", "mean+temperature")
LIKELY = 2.0  # standard errors from zero that are no noise
FEWEST = 30  # examples below which a standard error says little
# Metrics that choose between predictions: +1 where less is better.
SIGNS = {"nll": 1, "ece": 1, "accuracy": -1, "brier": 1}
LABELS = {"nll": "NLL", "accuracy": "accuracy", "ece": "ECE", "brier": "Brier"}
_SHOWN = {"nll": (1, 3, ""), "accuracy": (100, 1, " %"), "ece": (100, 1, " %")}  # factor, digits, unit


def is_beyond_noise(difference: float, error: float | None) -> bool:
    """Return whether a difference is `LIKELY` standard errors from zero; without an error none is."""
    return bool(error) and abs(difference) >= LIKELY * (error or 0.0)


def judge(difference: float, error: float, examples: int, sign: int = 1) -> str:
    """Return "better", "worse", "within noise", "the same" or "too few examples".

    Args:
        difference: in a metric, to what it is compared with.
        error: its standard error.
        examples: how many it was measured on.
        sign: +1 where less is better, −1 where more is.
    """
    if not difference and not error:
        return "the same"
    if examples < FEWEST:
        return "too few examples"
    if abs(difference) < LIKELY * error:
        return "within noise"
    return "better" if sign * difference < 0 else "worse"


def figures(versus: Mapping[str, tuple[float, float | None]]) -> str:
    """Return differences and their standard errors by metric in words: "NLL −0.010 ± 0.004, accuracy +1.2 ± 0.9 %"."""
    return ", ".join(
        f"{LABELS[metric]} {_signed(scale * versus[metric][0], digits)}"
        + ("" if versus[metric][1] is None else f" ± {scale * (versus[metric][1] or 0):.{digits}f}")
        + unit
        for metric, (scale, digits, unit) in _SHOWN.items()
        if metric in versus
    )


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def differences(
    values: Mapping[str, float | None],
    other: Mapping[str, float | None],
    resamples: Mapping[str, Tensor],
    other_resamples: Mapping[str, Tensor],
) -> dict[str, dict[str, float | None]]:
    """Return, for every metric that both have, `difference` (to `other`) and its `standard_error`.

    Args:
        values, other: the metrics of two variants.
        resamples, other_resamples: theirs under the same resampling (`bootstrap.bootstrap`).
    """
    from .bootstrap import standard_error

    paired: dict[str, dict[str, float | None]] = {}
    for name, value in values.items():
        against = other[name]
        if value is not None and against is not None:
            error = standard_error(resamples[name] - other_resamples[name])
            paired[name] = {"difference": value - against, "standard_error": error}
    return paired


def examples_needed(examples: int, difference: float, error: float) -> int | None:
    """Return about how many examples would show a difference like this one, rounded to two digits; None for any number.

    The standard error falls with the root of the number, so n·(2·error/difference)² examples have it at half the
    difference.
    """
    if not difference:
        return None
    needed = examples * (LIKELY * error / difference) ** 2
    if not math.isfinite(needed) or needed > 1e12:
        return None
    unit = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
    return math.ceil(needed / unit) * unit
