"""Scaling curves: accuracy by the number of outputs that minimum Bayes risk chooses from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from .style import BLUE, GREEN, GREY, VERMILION, house_style, new_figure

if TYPE_CHECKING:
    from ..generation.mbr import CurvePoint


@house_style
def scaling(curves: Mapping[str, Sequence[CurvePoint]]) -> Figure:
    """Draw accuracy against the number of outputs, a curve with its standard errors for each label.

    It is figure 3 of arXiv 2506.14280. The points of a curve share prompts, and so do the curves: they differ by less
    than the bars say.
    """
    figure, axes = new_figure("accuracy by the number of outputs", 6, 4.2)
    # Colour and marker go together; where they begin again, the line is dashed.
    own = zip((GREY, BLUE, VERMILION, GREEN), "so^D", strict=True)
    styles = itertools.cycle(itertools.product(("-", "--", ":"), own))
    for place, ((label, curve), (line, (color, marker))) in enumerate(zip(curves.items(), styles, strict=False)):
        shift = 1 + 0.03 * (place - (len(curves) - 1) / 2)  # bars side by side
        axes.errorbar(
            [shift * point.n for point in curve],
            [100 * point.accuracy for point in curve],
            [100 * point.se for point in curve],
            color=color, marker=marker, markersize=5, linestyle=line, linewidth=1.5, elinewidth=0.7, capsize=2,
            label=label,
        )  # fmt: skip
    ticks = sorted({point.n for curve in curves.values() for point in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n}" for n in ticks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="outputs per prompt", ylabel="accuracy (%)")
    axes.grid()
    figure.legend(loc="outside upper left")
    return figure
