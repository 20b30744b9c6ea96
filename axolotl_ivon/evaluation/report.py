"""What `ivon-post sweep` leaves behind: recommended.json, accuracy against calibration, and reliability diagrams."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from ..errors import IVONError, parameter
from ..figures import BLUE, GREEN, GREY, VERMILION, save_figure
from ..storage.atomic import output_folder
from .metrics import ECE_BINS, Scores, metrics
from .sweep import RECOMMENDED_FILE, GridPoint, Sweep, number, write_recommended


def trade_off(result: Sweep) -> Figure:
    """Draw accuracy against ECE (arXiv 2506.14280, figure 2), as on the half of the data that chooses.

    One curve runs over τ at the smallest ratio, one over the ratio at the τ nearest to 1; every other grid point is
    a grey dot. The Pareto front is ringed and joined, the recommended point a star.
    """
    points = result.points
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
        label=f"recommended by {result.objective}: τ {_tau_text(chosen.tau)}, ratio {chosen.ratio:g}",
    )  # fmt: skip
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


def reliability_bins(scores: Scores, bins: int = ECE_BINS["ece"]) -> tuple[list[float], list[float], list[float]]:
    """Return, per bin of confidence, the accuracy, the mean confidence (NaN where empty), and the share."""
    edges = torch.linspace(0, 1, bins + 1, dtype=scores.confidence.dtype)
    place = (torch.bucketize(scores.confidence, edges, right=True) - 1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    accuracy, confidence = (
        torch.bincount(place, weights=weights, minlength=bins) / count
        for weights in (scores.correct, scores.confidence)
    )
    return accuracy.tolist(), confidence.tolist(), (count / count.sum()).tolist()


def reliability(named: Mapping[str, Scores]) -> Figure:
    """Draw a reliability diagram for each of `named`: accuracy in every bin of confidence, and how full it is."""
    figure = Figure(figsize=(3.4 * len(named), 4.4), layout="constrained")
    grid: Any = figure.subplots(
        2, len(named), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    for column, (name, scores) in enumerate(named.items()):
        accuracy, confidence, share = reliability_bins(scores)
        width = 1 / len(share)
        middle = [(i + 0.5) * width for i in range(len(share))]
        top, bottom = grid[0][column], grid[1][column]
        top.bar(middle, accuracy, width * 0.94, color=BLUE, alpha=0.6, label="accuracy")
        gap = [c - a for a, c in zip(accuracy, confidence, strict=True)]
        hatched = {"facecolor": "none", "edgecolor": VERMILION, "linewidth": 0, "hatch": "////"}
        top.bar(middle, gap, width * 0.94, bottom=accuracy, label="gap to confidence", **hatched)
        top.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8)
        top.set_title(f"{name}: ECE {100 * (metrics(scores)['ece'] or 0):.1f} %", fontsize=10)
        top.set(xlim=(0, 1), ylim=(0, 1))
        bottom.bar(middle, [100 * s for s in share], width * 0.94, color=GREY)
        bottom.set_xlabel("confidence")
        bottom.yaxis.set_major_locator(MaxNLocator(3))
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    grid[0][0].set_ylabel("accuracy")
    grid[1][0].set_ylabel("predictions (%)")
    grid[0][0].legend(fontsize=8, loc="upper left")
    return figure


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Raise IVONError if `save` would refuse `folder`: worth asking before the evaluation."""
    if folder.exists() and not folder.is_dir():
        raise IVONError(f"{folder} is not a folder; choose another name with {parameter('output')}")
    if (folder / RECOMMENDED_FILE).exists() and not overwrite:
        raise IVONError(
            f"{folder} holds a sweep; choose another name with {parameter('output')}, or overwrite it "
            f"with {parameter('overwrite')}"
        )
    parent = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        raise IVONError(
            f"{folder} cannot be written (no permission for {parent}); choose another name with {parameter('output')}"
        )


def save(result: Sweep, folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Write two pictures, each as PNG and SVG, and then recommended.json with `facts` about the run in it.

    Returns:
        The files, recommended.json first.

    Raises:
        IVONError: a file cannot be written.
    """
    output_folder(folder)
    pictures = {"trade-off": trade_off(result), "reliability": reliability(result.reliability)}
    paths = [path for name, picture in pictures.items() for path in save_figure(picture, folder, name)]
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
