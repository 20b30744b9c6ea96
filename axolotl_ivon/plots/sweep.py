"""Trade-offs of a sweep: of one posterior over τ and pruning ratio, or of a product over the weights of its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ..metrics.verdict import METRICS
from ..records.recommendation import RECOMMENDED_FILE, GridPoint, Recommendation, describe
from ..reporter import SILENT, Reporter
from ..storage.atomic import output_folder
from .reliability import reliability, too_few
from .style import BLUE, GREEN, GREY, INK, VERMILION, house_style, new_figure, save_figures

if TYPE_CHECKING:
    from ..decisions.weights import WeightsPoint
    from ..metrics.scores import Scores


@house_style
def trade_off(sweep: Recommendation) -> Figure | str:
    """Draw accuracy against ECE (arXiv 2506.14280, figure 2), as on the half of the data that chooses.

    One curve runs over τ at the smallest ratio, one over the ratio at the τ nearest to 1; every other grid point is
    a grey dot. The Pareto front is ringed and joined, the recommended point a star with its standard errors.

    Returns:
        The figure, or in one line why there is nothing to be seen.
    """
    points = [point for point in sweep.grid if _has_place(point)]
    se = (sweep.reported_on.se.ece, sweep.reported_on.se.accuracy) if sweep.reported_on else (0, 0)
    errors = [100 * (error or 0) for error in se]
    if not points or not _has_place(sweep):
        return "no picture of the trade-off: the sweep has no grid with accuracy and ECE"
    spread = [max(values) - min(values) for values in _places(points)]
    if all(far <= error for far, error in zip(spread, errors, strict=True)):
        return (
            f"no picture of the trade-off: over the grid ECE differs by {spread[0]:.1f} % and accuracy by "
            f"{spread[1]:.1f} %, no more than their standard errors of {errors[0]:.1f} and {errors[1]:.1f} %"
        )
    ratio = min(point.ratio for point in points)
    tau = min((point.tau for point in points), key=lambda tau: abs(math.log(tau)))
    curves = [
        (f"temperature τ (ratio {ratio:g})", "τ", BLUE, [p for p in points if p.ratio == ratio]),
        (f"pruning ratio (τ {_text(tau)})", "r", VERMILION, [p for p in points if p.tau == tau]),
    ]
    figure, axes = new_figure("accuracy and calibration by temperature and pruning ratio", 7, 5)
    drawn = [point for *_, curve in curves if len(curve) > 1 for point in curve]
    if others := [point for point in points if point not in drawn]:
        axes.scatter(*_places(others), s=14, color=GREY, zorder=1, label="other grid points")
    notes: list[tuple[str, GridPoint, str]] = []
    for label, symbol, color, curve in curves:
        if len(curve) > 1:
            axes.plot(*_places(curve), "o-", color=color, markersize=5, linewidth=1.5, zorder=3, label=label)
            notes += [(f"{symbol} {_text(p.tau if symbol == 'τ' else p.ratio)}", p, color) for p in curve]
    front = sorted((point for point in points if point.front), key=lambda point: _place(point)[0])
    ring: dict[str, Any] = {"linewidth": 0.8, "markersize": 11, "markerfacecolor": "none", "zorder": 2}
    axes.plot(*_places(front), "--o", color=INK, label="Pareto front", **ring)
    chosen = describe(sweep.tau, sweep.ratio, sweep.temperature)
    star: dict[str, Any] = {"marker": "*", "s": 220, "color": GREEN, "edgecolor": INK, "linewidth": 0.6, "zorder": 4}
    axes.scatter(*_places([sweep]), label=f"recommended by {sweep.objective}: {chosen}", **star)
    bars: dict[str, Any] = {"color": GREEN, "linewidth": 1, "capsize": 3, "zorder": 3.5}
    axes.errorbar(*_places([sweep]), xerr=errors[:1], yerr=errors[1:], label="its standard errors", **bars)
    if sweep.examples is not None:
        axes.set_title(f"n = {sweep.examples.chosen_on:,} examples")
    axes.set(xlabel="expected calibration error (%), 10 bins", ylabel="accuracy (%)")
    axes.margins(0.1)
    axes.grid()
    axes.legend()
    _annotate(axes, notes, points)
    return figure


def save_sweep(
    sweep: Recommendation, scores: Mapping[str, Scores], folder: Path, reporter: Reporter = SILENT
) -> list[Path]:
    """Write the trade-off and the reliability of `scores` as pictures, and then recommended.json.

    Args:
        scores: by variant, on the half of the data that reports.
        reporter: hears why a picture is not drawn because it would show nothing.

    Returns:
        The files, recommended.json first.

    Raises:
        IVONError: a file cannot be written.
    """
    output_folder(folder)
    named = {name: (each.confidence.numpy(), each.correct.numpy()) for name, each in scores.items()}
    examples = min((len(each.group.unique()) for each in scores.values()), default=0)
    diagram = too_few(named) or reliability(named, counts=True, examples=examples)
    pictures = save_figures({"trade-off": trade_off(sweep), "reliability": diagram}, folder, reporter)
    sweep.save(folder / RECOMMENDED_FILE)
    return [folder / RECOMMENDED_FILE, *pictures]


def _has_place(point: GridPoint | Recommendation) -> bool:
    return point.chosen_on is not None and None not in (point.chosen_on.ece, point.chosen_on.accuracy)


def _place(point: GridPoint | Recommendation) -> tuple[float, float]:
    assert point.chosen_on is not None
    return 100 * (point.chosen_on.ece or 0), 100 * (point.chosen_on.accuracy or 0)


def _places(points: Sequence[GridPoint | Recommendation]) -> tuple[list[float], list[float]]:
    x, y = zip(*map(_place, points), strict=True) if points else ((), ())
    return list(x), list(y)


def _text(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"


def _annotate(axes: Axes, notes: Sequence[tuple[str, GridPoint, str]], points: Sequence[GridPoint]) -> None:
    """Write each note beside its point, where it covers no point and no other note."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    pixels = axes.transData.transform(list(map(_place, points)))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    # Points from the point: the further ones get a line to it.
    offsets = [(x, y) for y in (4, -12, 20, -28, 36, -44) for x in (7, -7)]
    for text, point, color in notes:
        for offset in offsets:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5} if abs(offset[1]) > 12 else None
            look: dict[str, Any] = {"fontsize": 8, "color": color, "ha": "left" if offset[0] > 0 else "right"}
            note = axes.annotate(text, _place(point), offset, textcoords="offset points", arrowprops=line, **look)
            note.get_window_extent()  # puts the text in its place; with the line, which must not count
            box = Text.get_window_extent(note)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


@house_style
def weights_front(points: Sequence[WeightsPoint], chosen: WeightsPoint, objective: str) -> Figure:
    """Draw the objective of products on one file against that on the other, with the front and the choice."""
    paths = list(chosen.chosen_on)
    label, scale = METRICS[objective].heading(" (%)"), 100 if METRICS[objective].percent else 1

    def places(points: Sequence[WeightsPoint]) -> list[list[float]]:
        return [[scale * point.chosen_on[path][objective] for point in points] for path in paths]

    front = sorted((point for point in points if point.front), key=lambda point: point.weights)
    figure, axes = new_figure("the product of the posteriors by their weights", 6, 5)
    axes.plot(*places(points), "o-", color=GREY, markersize=4, linewidth=1, label="weights")
    axes.plot(*places(front), "o", color=BLUE, markersize=8, label="Pareto front")
    axes.plot(*places([chosen]), "*", color=GREEN, markersize=16, markeredgecolor=INK, label="chosen")
    for point in points:
        [x], [y] = places([point])
        axes.annotate(point.describe(), (x, y), (6, 4), textcoords="offset points", fontsize=7)
    axes.set(**{f"{axis}label": f"{label} on {Path(path).name}" for axis, path in zip("xy", paths, strict=True)})
    axes.set_title("product of the posteriors by their weights, on the half that chooses")
    axes.margins(0.12)
    axes.grid()
    axes.legend()
    return figure
