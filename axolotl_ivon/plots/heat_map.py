"""Heat maps of what is in the weights: one figure for each module, layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from .style import INK, house_style, new_figure


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
