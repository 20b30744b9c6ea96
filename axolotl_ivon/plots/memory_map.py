"""The memory map of the training rows (Nickl et al. 2023, arXiv 2310.19273)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .style import BLUE, VERMILION, house_style, new_figure


@house_style
def memory_map(leverage: np.ndarray, loss: np.ndarray, marked: np.ndarray) -> Figure:
    """Draw the loss of training rows against their leverage, shape (n,), and mark some (bool).

    What the model has not learned is above, what it is unsure of on the right.
    """
    figure, axes = new_figure("loss of the training rows against their leverage", 5.2, 3.4)
    for chosen, color, size, label in ((~marked, BLUE, 9, None), (marked, VERMILION, 22, "listed below")):
        axes.scatter(leverage[chosen], loss[chosen], s=size, color=color, alpha=0.6, linewidths=0, label=label)
    axes.set(xlabel="leverage (variance of the log-odds)", ylabel="loss (nats a token)", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):  # matplotlib's own labels of such an axis are formulas
        axis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure
