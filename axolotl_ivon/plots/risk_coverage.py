"""Risk against coverage: how many answers are wrong if only the most confident are given?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..metrics.selective import RiskCoverage
from .reliability import Predictions
from .style import GREEN, INK, house_style, line_style, new_figure


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
