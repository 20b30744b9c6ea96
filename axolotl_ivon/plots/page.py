"""The pictures that only the report has, for its sections on weights, other data, training rows and abstention."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..metrics.selective import RiskCoverage
from .reliability import Predictions
from .style import BLUE, GREEN, GREY, INK, VERMILION, house_style, line_style, new_figure


def split_module(module: str) -> tuple[int | None, str]:
    """Return the layer of a module, which is the first number in its name, and what it is called within it."""
    parts = re.match(r"(?:.*?\.)?(\d+)\.(.+)", module)
    return (int(parts[1]), parts[2]) if parts else (None, module)


@house_style
def heat_map(title: str, values: Mapping[str, float | None]) -> Figure:
    """Draw a value for each module, which `values` has by name, layers from left to right."""
    places = {name: split_module(name) for name in values}
    layers: list[int | None] = [*sorted({layer for layer, _ in places.values() if layer is not None})]
    layers += [None] if any(layer is None for layer, _ in places.values()) else []
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    cells = np.full((len(kinds), len(layers)), np.nan)
    for name, value in values.items():
        layer, kind = places[name]
        if value is not None:
            cells[kinds.index(kind), layers.index(layer)] = value
    known = cells[np.isfinite(cells) & (cells > 0)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    wide = len(known) and high > 20 * low
    scale: Normalize = LogNorm(low, high) if wide else Normalize(low, high if high > low else low * 1.01 + 1e-12)
    width, height = 2.0 + 0.075 * max(map(len, kinds)) + max(1.2, 0.22 * len(layers)), 1.1 + 0.26 * len(kinds)
    figure, axes = new_figure(f"{title}, by layer and module", width, height)
    colors = matplotlib.colormaps["viridis"].resampled(40)  # more would make a bitmap of the bar
    mesh = axes.pcolormesh(np.ma.masked_invalid(cells), norm=scale, cmap=colors, linewidth=0.4, edgecolor=INK)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8.5)
    shown = range(0, len(layers), math.ceil(len(layers) / 16))
    axes.set_xticks([i + 0.5 for i in shown], ["–" if layers[i] is None else str(layers[i]) for i in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    figure.colorbar(mesh, ax=axes, label=title, pad=0.02, format="{x:g}")
    return figure


@house_style
def histograms(score: str, data: np.ndarray, others: Mapping[str, np.ndarray], note: str = "") -> Figure:
    """Draw how the values of a score are spread over the data, and over each of the other files."""
    figure, axes = new_figure(f"{score} of the data and of other data", 3.4, 2.5 + 0.2 * (1 + len(others)))
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
    figure.legend(loc="outside lower center")  # among the bars there is often no room
    return figure


@house_style
def memory_map(leverage: np.ndarray, loss: np.ndarray, marked: np.ndarray) -> Figure:
    """Draw the loss of training rows against their leverage, shape (n,), and mark some (bool): arXiv 2310.19273.

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


@house_style
def risk_coverage(
    data: str,
    named: Mapping[str, Predictions],
    promised: float | None = None,
    answered: tuple[float, float] | None = None,
) -> Figure:
    """Draw the share of errors among the most confident answers against their share, a curve for each variant.

    Args:
        data: the file that it is drawn for.
        named: predictions by the name of their variant.
        promised: the share of errors that a threshold promises not to exceed.
        answered: the coverage and the risk at that threshold.
    """
    figure, axes = new_figure(f"risk and coverage on {data}", 4.4, 3.2)
    top = promised or 0.0
    curves: dict[bytes, list[str]] = {}  # a temperature leaves the order of two choices as it is
    for variant, (confidence, right) in named.items():
        curve = np.stack(RiskCoverage(confidence, 1 - right).curve())
        curves.setdefault(curve.tobytes(), []).append(variant)
        top = max(top, float(curve[1, curve.shape[1] // 20 :].max()))
    for curve_bytes, variants in curves.items():
        coverage, risk = 100 * np.frombuffer(curve_bytes).reshape(2, -1)
        axes.plot(coverage, risk, **line_style(variants[0]), linewidth=1.6, label=",\n".join(variants))
    if promised is not None:
        label = f"promised: {100 * promised:g} %"
        axes.axhline(100 * promised, color=GREEN, linewidth=1, linestyle="--", label=label)
    if answered is not None:
        star: dict[str, Any] = {"marker": "*", "s": 170, "edgecolor": INK, "linewidth": 0.6, "zorder": 5}
        axes.scatter(100 * answered[0], 100 * answered[1], color=GREEN, label="at the threshold", **star)
    axes.set(xlim=(0, 100), xlabel="coverage: answered (%)", ylabel="risk: wrong of those (%)")
    axes.set_ylim(0, max(1.0, 108 * top))
    axes.grid()
    axes.legend()
    return figure
