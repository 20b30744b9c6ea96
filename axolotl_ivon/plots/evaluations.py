"""What `ivon-post sweep` leaves behind: recommended.json, accuracy against calibration, and reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from ..decisions.sweep import GridPoint, Sweep, number, write_recommended
from ..metrics.scores import ECE_BINS, Scores, metrics
from ..storage.atomic import output_folder
from .figures import BLUE, GREEN, GREY, VERMILION, save_figure

FEWEST = 5  # predictions in a bin that say something


def trade_off(result: Sweep) -> Figure | str:
    """Draw accuracy against ECE (arXiv 2506.14280, figure 2), as on the half of the data that chooses.

    One curve runs over τ at the smallest ratio, one over the ratio at the τ nearest to 1; every other grid point is
    a grey dot. The Pareto front is ringed and joined, the recommended point a star with its standard errors.

    Returns:
        The figure, or in one line why there is nothing to be seen.
    """
    points = result.points
    errors = [100 * (result.error.get(name) or 0) for name in ("ece", "accuracy")]
    spread = [max(values) - min(values) for values in _coordinates(points)]
    if all(far <= error for far, error in zip(spread, errors, strict=True)):
        return (
            f"no picture of the trade-off: over the grid ECE differs by {spread[0]:.1f} % and accuracy by "
            f"{spread[1]:.1f} %, no more than their standard errors of {errors[0]:.1f} and {errors[1]:.1f} %"
        )
    ratio = min(point.ratio for point in points)
    tau = min((point.tau for point in points), key=lambda tau: abs(math.log(tau)))
    curves = [
        (f"temperature τ (ratio {ratio:g})", "τ", BLUE, [p for p in points if p.ratio == ratio]),
        (f"pruning ratio (τ {_tau_text(tau)})", "r", VERMILION, [p for p in points if p.tau == tau]),
    ]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*_coordinates(points), s=14, color=GREY, zorder=1, label="other grid points")
    labels: list[tuple[str, GridPoint, str]] = []
    for label, symbol, color, curve in curves:
        if len(curve) > 1:
            axes.plot(*_coordinates(curve), "o-", color=color, markersize=5, linewidth=1.5, zorder=3, label=label)
            labels += [(f"{symbol} {_tau_text(p.tau if symbol == 'τ' else p.ratio)}", p, color) for p in curve]
    front = sorted((p for p in points if p.front), key=lambda p: p.chosen_on["ece"])
    axes.plot(
        *_coordinates(front), "--o", color="black", linewidth=0.8, markersize=11, markerfacecolor="none", zorder=2,
        label="Pareto front",
    )  # fmt: skip
    chosen = result.recommended
    axes.scatter(
        *_coordinates([chosen]), marker="*", s=220, color=GREEN, edgecolor="black", linewidth=0.6, zorder=4,
        label=f"recommended by {result.objective}: {chosen.describe()}",
    )  # fmt: skip
    axes.errorbar(
        *_coordinates([chosen]), xerr=errors[:1], yerr=errors[1:], color=GREEN, linewidth=1, capsize=3, zorder=3.5,
        label="its standard errors",
    )  # fmt: skip
    for scores in list(result.reliability.values())[:1]:
        axes.set_title(f"n = {len(scores.group.unique()):,} examples", fontsize=9)
    axes.set_xlabel("expected calibration error (%), 10 bins")
    axes.set_ylabel("accuracy (%)")
    axes.margins(0.1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    _annotate(axes, labels, points)
    return figure


def _annotate(axes: Axes, labels: Sequence[tuple[str, GridPoint, str]], points: Sequence[GridPoint]) -> None:
    """Write each label beside its point, where it covers no point and no other label."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    where = axes.transData.transform(list(zip(*_coordinates(points), strict=True)))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in where]
    # Points from the point: the further ones get a line to it.
    offsets = [(x, y) for y in (4, -12, 20, -28, 36, -44) for x in (7, -7)]
    for text, point, color in labels:
        [[x], [y]] = _coordinates([point])
        for offset in offsets:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5} if abs(offset[1]) > 12 else None
            side = "left" if offset[0] > 0 else "right"
            note = axes.annotate(
                text, (x, y), offset, textcoords="offset points", fontsize=8, color=color, ha=side, arrowprops=line
            )
            note.get_window_extent()  # puts the text in its place; with the line, which must not count
            box = Text.get_window_extent(note)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def _tau_text(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"


def _coordinates(points: Sequence[GridPoint]) -> tuple[list[float], list[float]]:
    return [100 * p.chosen_on["ece"] for p in points], [100 * p.chosen_on["accuracy"] for p in points]


@dataclass(frozen=True)
class Bin:
    """The predictions with a confidence in one bin: how many, their mean confidence, and what share is right."""

    count: int
    confidence: float
    accuracy: float

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval for the accuracy (1927): it needs no normal distribution of a share."""
        z2 = 1.96**2 / self.count
        middle = (self.accuracy + z2 / 2) / (1 + z2)
        half = math.sqrt(z2 * (self.accuracy * (1 - self.accuracy) + z2 / 4)) / (1 + z2)
        return max(0.0, middle - half), min(1.0, middle + half)


def reliability_bins(scores: Scores, bins: int = ECE_BINS["ece"]) -> list[Bin]:
    """Return bins of equal width; confidence and accuracy are NaN where one is empty."""
    edges = torch.linspace(0, 1, bins + 1, dtype=scores.confidence.dtype)
    place = (torch.bucketize(scores.confidence, edges, right=True) - 1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    confidence, accuracy = (
        torch.bincount(place, weights=weights, minlength=bins) / count
        for weights in (scores.confidence, scores.correct)
    )
    return [Bin(*one) for one in zip(count.tolist(), confidence.tolist(), accuracy.tolist(), strict=True)]


def reliability(named: Mapping[str, Scores]) -> Figure | str:
    """Draw a reliability diagram for each of `named`: accuracy in every bin of confidence, and how full it is.

    Bars have binomial 95 % intervals; a bin with fewer than `FEWEST` predictions is a hollow point without one.

    Returns:
        The figure, or in one line why there is nothing to be seen.
    """
    filled = {name: reliability_bins(scores) for name, scores in named.items()}
    if not any(sum(one.count >= FEWEST for one in bins) > 1 for bins in filled.values()):
        return f"no reliability diagram: no two bins of confidence have {FEWEST} predictions or more"
    figure = Figure(figsize=(3.4 * len(named), 4.4), layout="constrained")
    grid: Any = figure.subplots(
        2, len(named), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    for (name, scores), column in zip(named.items(), grid.T, strict=True):
        _draw_reliability(column[0], column[1], filled[name])
        count, examples = len(scores.group), len(scores.group.unique())
        size = f"n = {count:,}" + (f" tokens of {examples:,} answers" if count > examples else "")
        column[0].set_title(f"{name}\nECE {100 * (metrics(scores)['ece'] or 0):.1f} %, {size}", fontsize=9)
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    grid[0][0].set_ylabel("accuracy")
    grid[1][0].set_ylabel("predictions")
    parts = {label: part for axes in grid[0] for part, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[0][0].legend(parts.values(), parts.keys(), fontsize=7, loc="upper left")
    return figure


def _short(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.1f}k"


def _draw_reliability(top: Axes, bottom: Axes, bins: Sequence[Bin]) -> None:
    width = 1 / len(bins)
    places = {(i + 0.5) * width: one for i, one in enumerate(bins) if one.count}
    telling = {middle: one for middle, one in places.items() if one.count >= FEWEST}
    few = {middle: one for middle, one in places.items() if one.count < FEWEST}
    heights = [one.accuracy for one in telling.values()]
    top.bar(list(telling), heights, width * 0.94, color=BLUE, alpha=0.6, label="accuracy, 95 % interval")
    gaps = [one.confidence - one.accuracy for one in telling.values()]
    hatched: Any = {"facecolor": "none", "edgecolor": VERMILION, "linewidth": 0, "hatch": "////"}
    top.bar(list(telling), gaps, width * 0.94, bottom=heights, label="gap to confidence", **hatched)
    ends = [one.interval() for one in telling.values()]
    around = [
        [height - low for height, (low, _) in zip(heights, ends, strict=True)],
        [high - height for height, (_, high) in zip(heights, ends, strict=True)],
    ]
    top.errorbar(list(telling), heights, around, fmt="none", color="black", capsize=2, linewidth=1)
    if few:
        where = [one.confidence for one in few.values()], [one.accuracy for one in few.values()]
        label = f"fewer than {FEWEST} predictions"
        top.plot(*where, "o", color=GREY, markersize=4, markerfacecolor="none", clip_on=False, label=label)
    top.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8)
    top.set(xlim=(0, 1), ylim=(0, 1))
    bottom.bar(list(places), [one.count for one in places.values()], width * 0.94, color=GREY)
    for middle, one in places.items():
        bottom.annotate(
            _short(one.count), (middle, one.count), (0, 1), textcoords="offset points", ha="center", fontsize=6
        )
    bottom.margins(y=0.2)
    bottom.set_xlabel("confidence")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def save(
    result: Sweep, folder: Path, facts: dict[str, Any], notify: Callable[[str], None] = lambda message: None
) -> list[Path]:
    """Write two pictures, each as PNG and SVG, and then recommended.json with `facts` about the run in it.

    Where a picture would show nothing there is none; `notify` is told why.

    Returns:
        The files, recommended.json first.

    Raises:
        IVONError: a file cannot be written.
    """
    output_folder(folder)
    paths: list[Path] = []
    for name, picture in {"trade-off": trade_off(result), "reliability": reliability(result.reliability)}.items():
        if isinstance(picture, Figure):
            paths += save_figure(picture, folder, name)
            continue
        notify(picture)
        for kind in ("png", "svg"):  # an earlier sweep's
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    point = result.recommended
    document = {
        "tau": number(point.tau),
        "ratio": point.ratio,
        "temperature": point.temperature,
        "objective": result.objective,
        "score": "probability",
        **(result.abstention.document() if result.abstention else {}),
        **facts,
        "examples": dict(zip(("chosen_on", "reported_on"), result.examples, strict=True)),
        "chosen_on": point.chosen_on,
        "reported_on": {**point.reported_on, "se": result.error},
        "mean_reported_on": result.mean.reported_on,
        "verdict": asdict(result.verdict),
        **{
            name: [{**asdict(point), "tau": number(point.tau)} for point in points]
            for name, points in {"best": [result.best], "grid": result.points, "scaled": result.scaled}.items()
        },
    }
    document["best"] = document["best"][0]
    return [write_recommended(folder, document), *paths]
