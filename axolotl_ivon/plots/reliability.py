"""Reliability diagrams: is what is predicted with 80 % confidence right 80 times of 100?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import GREY, INK, house_style, line_style

BINS = 10
FEWEST = 5  # predictions in a bin that say something


class Bins(NamedTuple):
    """Predictions by their confidence, in bins of equal width of which the empty ones are left out.

    Attributes:
        counts: how many are in each bin; like all others of shape (bins,).
        confidence: their mean confidence.
        accuracy: the share that is right.
        low, high: Wilson's 95 % interval of the accuracy (1927), which assumes no normal distribution of a share.
        middle: of the bin.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    middle: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, right: np.ndarray) -> Bins:
        """Sort predictions into bins by `confidence` (n,); `right` (n,) is 1 or 0, or a share between."""
        place = np.clip(np.searchsorted(np.linspace(0, 1, BINS + 1), confidence, "right") - 1, 0, BINS - 1)
        count = np.bincount(place, minlength=BINS)
        filled = np.flatnonzero(count)
        count = count[filled]
        sure, accuracy = (np.bincount(place, values, BINS)[filled] / count for values in (confidence, right))
        z2 = 1.96**2 / count
        middle = (accuracy + z2 / 2) / (1 + z2)
        half = np.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / 4)) / (1 + z2)
        low, high = np.clip(middle - half, 0, accuracy), np.clip(middle + half, accuracy, 1)
        return cls(count, sure, accuracy, low, high, (filled + 0.5) / BINS)

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (ECE), from 0 to 1."""
        return float((self.counts * abs(self.accuracy - self.confidence)).sum() / self.counts.sum())

    def where(self, chosen: np.ndarray) -> Bins:
        """Return some of the bins."""
        return Bins(*(values[chosen] for values in self))


Predictions = tuple[np.ndarray, np.ndarray]
"""The confidence of every prediction, and whether it is right (1 or 0, or a share between), both of shape (n,)."""


def too_few(named: Mapping[str, Predictions]) -> str:
    """Return in one line why a diagram would show nothing, or "" if it shows something."""
    if any((Bins.of(*predictions).counts >= FEWEST).sum() > 1 for predictions in named.values()):
        return ""
    return f"no reliability diagram: no two bins of confidence have {FEWEST} predictions or more"


@house_style
def reliability(named: Mapping[str, Predictions], counts: bool = False, examples: int | None = None) -> Figure:
    """Draw accuracy against confidence in ten bins with 95 % intervals, a panel for each variant in `named`.

    A bin with fewer than `FEWEST` predictions is a hollow point without an interval.

    Args:
        counts: draw below how many predictions each bin has.
        examples: how many examples the predictions are of, if an example has several.
    """
    figure = Figure(figsize=(3 * len(named), 4.2 if counts else 3), layout="constrained")
    figure.set_label(f"reliability of {', '.join(named)}")
    panels = figure.subplots(
        1 + counts, len(named), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1][: 1 + counts]
    )
    for (variant, (confidence, right)), column in zip(named.items(), panels.T, strict=True):
        bins = Bins.of(confidence, right)
        _draw_accuracy(column[0], bins, line_style(variant)["color"])
        size = f"n = {len(right):,}"
        if examples is not None and examples < len(right):
            size += f" tokens of {examples:,} answers"
        column[0].set_title(f"{variant}\nECE {100 * bins.calibration_error:.1f} %, {size}")
        if counts:
            bars = column[1].bar(bins.middle, bins.counts, 0.94 / BINS, color=GREY)
            labels = [str(count) if count < 1000 else f"{count / 1000:.1f}k" for count in bins.counts]
            column[1].bar_label(bars, labels, padding=1, fontsize=6, in_layout=False)
            column[1].margins(y=0.25)
            column[1].yaxis.set_major_locator(MaxNLocator(3, integer=True))
        column[-1].set_xlabel("confidence")
    for row, label in zip(panels, ("accuracy", "predictions"), strict=False):
        row[0].set_ylabel(label)
    if counts:
        panels[0, 0].legend(loc="upper left", fontsize=7)
    return figure


def _draw_accuracy(axes: Axes, bins: Bins, color: str) -> None:
    telling, few = bins.where(bins.counts >= FEWEST), bins.where(bins.counts < FEWEST)
    axes.bar(telling.middle, telling.accuracy, 0.94 / BINS, color=color, alpha=0.45)
    around = np.stack([telling.accuracy - telling.low, telling.high - telling.accuracy])
    point: dict[str, Any] = {"fmt": "o", "markersize": 5, "color": color, "label": "accuracy, 95 % interval"}
    axes.errorbar(telling.confidence, telling.accuracy, around, ecolor=INK, elinewidth=1, capsize=2, **point)
    hollow: dict[str, Any] = {"color": GREY, "markersize": 4, "markerfacecolor": "none", "clip_on": False}
    if len(few.counts):
        axes.plot(few.confidence, few.accuracy, "o", label=f"fewer than {FEWEST}", **hollow)
    axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
