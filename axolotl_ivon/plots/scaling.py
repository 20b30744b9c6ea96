"""What `ivon-post mbr` leaves behind: the choices as JSONL, and accuracy against the number of outputs as a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..generation.mbr import CurvePoint, MBRResult
from ..storage.atomic import new_file, output_folder
from .figures import BLUE, GREEN, GREY, VERMILION, save_figure


def scaling(curves: Mapping[str, Sequence[CurvePoint]]) -> Figure:
    """Draw accuracy against the number of outputs, a curve with its standard errors for each label.

    It is figure 3 of arXiv 2506.14280. The points of a curve share prompts, and so do the curves: they differ by less
    than the bars say.
    """
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = zip(itertools.cycle((GREY, BLUE, VERMILION, GREEN)), itertools.cycle("so^D"), strict=False)
    for place, ((label, curve), (color, marker)) in enumerate(zip(curves.items(), styles, strict=False)):
        shift = 1 + 0.03 * (place - (len(curves) - 1) / 2)  # bars side by side
        axes.errorbar(
            [shift * point.n for point in curve],
            [100 * point.accuracy for point in curve],
            [100 * point.se for point in curve],
            color=color, marker=marker, markersize=5, linewidth=1.5, elinewidth=0.7, capsize=2, label=label,
        )  # fmt: skip
    ticks = sorted({point.n for curve in curves.values() for point in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n}" for n in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("outputs per prompt")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    return figure


def save(results: Mapping[str, MBRResult], folder: Path) -> list[Path]:
    """Write each file's choices as LABEL.jsonl and, where there are accuracies, figure 3 as PNG and SVG.

    Returns:
        The files.

    Raises:
        IVONError: a file cannot be written.
    """
    output_folder(folder)
    paths: list[Path] = []
    for label, result in results.items():
        paths.append(folder / f"{label}.jsonl")
        with new_file(paths[-1]) as temporary:
            lines = [json.dumps(choice.record(), ensure_ascii=False) + "\n" for choice in result.choices]
            temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    curves = {label: result.curve for label, result in results.items() if result.curve}
    if curves:
        paths += save_figure(scaling(curves), folder, "accuracy")
    return paths
