"""The pictures of a report: SVG that lies in the page, in the page's own colours and type.

What matplotlib writes black is `currentColor` here, and each colour of the palette a variable of the style sheet, so
one picture serves the light page, the dark one and the printed one.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..decisions.sweep import GridPoint, Sweep, Verdict
from .evaluations import FEWEST, Bin, trade_off
from .figures import BLUE, GREEN, GREY, VERMILION

_INK = "#010203"  # stands for the colour of the text
_VARIABLES = {BLUE: "--blue", VERMILION: "--vermilion", GREEN: "--green", GREY: "--grey"}
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a file's name is no formula
}
_BINS = 10


def draw(figure: Figure, title: str) -> str:
    """Return a figure as an SVG element for a page; `title` is what those hear who do not see it."""
    written = io.StringIO()
    # The salt goes into the names of what the picture defines: two pictures of a page must not share them.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts write it
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    used = set(re.findall(r"#([\w-]+)[)\"]", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = text.replace(_INK, "currentColor").replace("#000000", "currentColor")
    width = 4 / 3 * float(re.search(r'width="([\d.]+)pt"', text)[1])  # type: ignore[index]  # in CSS pixels
    return re.sub(
        r"<svg([^>]*)>",
        lambda found: (
            f'<svg role="img" aria-label="{html.escape(title)}" fill="currentColor" '
            f'style="--natural: {width:.0f}px"{found[1]}>'
            f"<title>{html.escape(title)}</title>"
        ),
        text,
        count=1,
    )


def width(picture: str) -> int:
    """Return how many CSS pixels wide a picture is by itself."""
    return int(re.findall(r"--natural: (\d+)px", picture)[0])


def _figure(width: float = 4.2, height: float = 3.1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def line_of(row: str) -> dict[str, Any]:
    """Return the line of a row: base, mean or posterior by colour, what was done to it by dashes."""
    color = next(
        (c for name, c in (("base", GREY), ("mean", VERMILION), ("posterior", BLUE)) if row.startswith(name)), GREEN
    )
    return {"color": color, "linestyle": "--" if "temperature" in row else ":" if "pruned" in row else "-"}


def reliability(name: str, confidence: np.ndarray, right: np.ndarray) -> str:
    """Draw accuracy against confidence, both shape (n,), in ten bins with their binomial 95 % intervals.

    A bin with fewer than `FEWEST` examples is a hollow point.
    """
    place = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
    filled = [(right[place == i], confidence[place == i], (i + 0.5) / _BINS) for i in np.unique(place)]
    bins = [(Bin(len(r), float(c.mean()), float(r.mean())), middle) for r, c, middle in filled]
    telling = [(one, middle) for one, middle in bins if one.count >= FEWEST]
    few = [one for one, _ in bins if one.count < FEWEST]
    color = line_of(name)["color"]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0, 3.0)
        heights = [one.accuracy for one, _ in telling]
        axes.bar([middle for _, middle in telling], heights, 0.94 / _BINS, color=color, alpha=0.45)
        where = [one.confidence for one, _ in telling]
        around = [[abs(one.accuracy - one.interval()[end]) for one, _ in telling] for end in (0, 1)]
        axes.errorbar(where, heights, around, fmt="o", markersize=5, color=color, ecolor=_INK, elinewidth=1, capsize=2)
        axes.plot(
            [one.confidence for one in few], [one.accuracy for one in few], "o", color=GREY, markersize=4,
            markerfacecolor="none", clip_on=False,
        )  # fmt: skip
        axes.plot([0, 1], [0, 1], "--", color=_INK, linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        error = sum(one.count * abs(one.accuracy - one.confidence) for one, _ in bins) / len(confidence)
        axes.set_title(f"{name}\nECE {100 * error:.1f} %, n = {len(confidence):,}", fontsize=9)
    return draw(figure, f"reliability of {name}")


def risk_coverage(
    data: str,
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]],
    promised: float | None = None,
    answered: tuple[float, float] | None = None,
) -> str:
    """Draw, for every row's confidence and rightness, the errors among the most confident against their share.

    Args:
        data: what it is drawn for.
        promised: the share of errors that a threshold promises not to exceed.
        answered: the coverage and the risk at that threshold.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.2)
        top = promised or 0.0
        drawn: dict[bytes, list[str]] = {}  # a temperature leaves the order of two choices as it is
        for name, (confidence, right) in rows.items():
            curve = np.stack(selective_curve(confidence, right))
            drawn.setdefault(curve.tobytes(), []).append(name)
            top = max(top, float(curve[1, curve.shape[1] // 20 :].max()))
        for held, names in drawn.items():
            coverage, risk = np.frombuffer(held).reshape(2, -1)
            axes.plot(100 * coverage, 100 * risk, **line_of(names[0]), linewidth=1.6, label=",\n".join(names))
        if promised is not None:
            axes.axhline(
                100 * promised, color=GREEN, linewidth=1, linestyle="--", label=f"promised: {100 * promised:g} %"
            )
        if answered is not None:
            axes.scatter(
                [100 * answered[0]], [100 * answered[1]], marker="*", s=170, color=GREEN, edgecolor=_INK, linewidth=0.6,
                zorder=5, label="at the threshold",
            )  # fmt: skip
        axes.set(xlim=(0, 100), xlabel="coverage: answered (%)", ylabel="risk: wrong of those (%)")
        axes.set_ylim(0, max(1.0, 108 * top))
        axes.grid(alpha=0.25)
        axes.legend(loc="best")
    return draw(figure, f"risk and coverage on {data}")


def selective_curve(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coverage and risk of the most confident, after each height of the confidence, shape (heights,)."""
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.diff(confidence[order], append=np.nan))
    answered = np.arange(1, len(order) + 1)[ends]
    return answered / len(order), (1 - right[order]).cumsum()[ends] / answered


def histograms(score: str, usual: np.ndarray, others: Mapping[str, np.ndarray], note: str = "") -> str:
    """Draw how a score is spread over the data, and over each of the other files."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.4, 2.7)
        everything = np.concatenate([usual, *others.values()])
        low, high = float(everything.min()), float(everything.max())
        edges = np.linspace(low, high if high > low else low + 1, 26)
        colors = [VERMILION, GREEN, GREY]
        named = {"the data": usual, **others}
        for i, (name, values) in enumerate(named.items()):
            weights = np.full(len(values), 100 / len(values))
            color = BLUE if not i else colors[(i - 1) % len(colors)]
            axes.hist(values, edges, weights=weights, color=color, alpha=0.4)
            axes.hist(values, edges, weights=weights, color=color, histtype="step", linewidth=1.2, label=name)
        axes.set(xlabel=score, ylabel="examples (%)")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if note:
            axes.set_title(note, fontsize=9)
        axes.legend(loc="best")
    return draw(figure, f"{score} of the data and of other data")


def memory_map(leverage: np.ndarray, loss: np.ndarray, marked: np.ndarray) -> str:
    """Draw the loss of training rows against their leverage, shape (n,), and mark some (bool).

    The memory map of arXiv 2310.19273: what the model has not learned is above, what it is unsure of on the right.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(5.2, 3.4)
        for chosen, color, size, name in ((~marked, BLUE, 9, None), (marked, VERMILION, 22, "listed below")):
            axes.scatter(leverage[chosen], loss[chosen], s=size, color=color, alpha=0.6, linewidths=0, label=name)
        axes.set(xlabel="leverage (variance of the log-odds)", ylabel="loss (nats a token)", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib's own labels of such an axis are formulas
            axis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.legend(loc="best")
    return draw(figure, "loss of the training rows against their leverage")


def grid_of(recommended: Mapping[str, Any]) -> Sweep | None:
    """Return the sweep that recommended.json tells of, without the scores; None where it has no whole grid."""

    def point(told: Mapping[str, Any]) -> GridPoint:
        found = GridPoint(
            float(told["tau"]), float(told["ratio"]), told["chosen_on"], told["reported_on"],
            bool(told.get("front", False)), float(told.get("temperature", 1)),
        )  # fmt: skip
        float(found.chosen_on["accuracy"]), float(found.chosen_on["ece"])
        return found

    try:
        points, chosen = [point(told) for told in recommended["grid"]], point(recommended)
        if not points:
            return None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    told = chosen.reported_on.get("se") if isinstance(chosen.reported_on, dict) else None
    errors = {name: value for name, value in told.items() if isinstance(value, float)} if isinstance(told, dict) else {}
    verdict = Verdict({}, "", [], None, "")
    return Sweep(points, [], chosen, chosen, str(recommended.get("objective")), verdict, (0, 0), dict(errors), {})


def sweep_picture(result: Sweep) -> tuple[str, str]:
    """Draw accuracy against calibration error over temperatures and pruning ratios, as `sweep` does.

    Returns:
        The picture, or an empty one and in one line why there is nothing to be seen.
    """
    with matplotlib.rc_context(_STYLE):
        figure = trade_off(result)
        if isinstance(figure, str):
            return "", figure
        return draw(figure, "accuracy and calibration by temperature and pruning ratio"), ""


def place_of(module: str) -> tuple[int | None, str]:
    """Return the layer of a module, which is the first number in its name, and what it is called within it."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", module)
    return (int(found[1]), found[2]) if found else (None, module)


def heat_map(title: str, values: Mapping[str, float | None]) -> str:
    """Draw one figure for each module, which `values` has by name, layers from left to right."""
    places = {name: place_of(name) for name in values}
    layers: list[int | None] = [*sorted({layer for layer, _ in places.values() if layer is not None})]
    layers += [None] if any(layer is None for layer, _ in places.values()) else []
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    cells = np.full((len(kinds), len(layers)), np.nan)
    for name, value in values.items():
        layer, kind = places[name]
        if value is not None:
            cells[kinds.index(kind), layers.index(layer)] = value
    known = cells[np.isfinite(cells) & (cells > 0)]
    wide = len(known) and known.max() > 20 * known.min()
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    scale: Normalize = LogNorm(low, high) if wide else Normalize(low, high if high > low else low * 1.01 + 1e-12)
    with matplotlib.rc_context(_STYLE):
        longest = max(map(len, kinds))
        figure, axes = _figure(2.0 + 0.075 * longest + max(1.2, 0.22 * len(layers)), 1.1 + 0.26 * len(kinds))
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(cells),
            norm=scale,
            cmap=matplotlib.colormaps["viridis"].resampled(40),  # more would make a bitmap of the bar
            linewidth=0.4,
            edgecolor=_INK,
        )
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8.5)
        step = math.ceil(len(layers) / 16)
        shown = range(0, len(layers), step)
        axes.set_xticks([i + 0.5 for i in shown], ["–" if layers[i] is None else str(layers[i]) for i in shown])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer")
        figure.colorbar(mesh, ax=axes, label=title, pad=0.02, format="{x:g}")
    return draw(figure, f"{title}, by layer and module")


def rows_in_order(names: Sequence[str]) -> list[str]:
    """Return names of rows without the pruned ones, unless there are no others: a picture of five is legible."""
    return [name for name in names if "pruned" not in name] or list(names)
