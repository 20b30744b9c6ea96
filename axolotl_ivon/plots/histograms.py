"""Histograms of an uncertainty: does it tell other data from the data?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import BLUE, GREEN, GREY, VERMILION, house_style, new_figure


@house_style
def histograms(score: str, data: np.ndarray, others: Mapping[str, np.ndarray], note: str = "") -> Figure:
    """Draw how the values of a score are spread over the data, and over each of the other files."""
    figure, axes = new_figure(f"{score} of the data and of other data", 3.4, 2.7)
    every = np.concatenate([data, *others.values()])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, 26).tolist()
    for place, (name, values) in enumerate({"the data": data, **others}.items()):
        color = BLUE if place == 0 else (VERMILION, GREEN, GREY)[(place - 1) % 3]
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, edges, weights=share, color=color, alpha=0.4)
        axes.hist(values, edges, weights=share, color=color, histtype="step", linewidth=1.2, label=name)
    axes.set(xlabel=score, ylabel="examples (%)", title=note)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.legend()
    return figure
