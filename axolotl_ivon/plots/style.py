"""The house style of every picture, and its two ways out: files, and SVG inside a page.

Figures are made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reporter import SILENT, Reporter
from ..storage.atomic import new_file

# Of the palette by Okabe and Ito, which the colour-blind tell apart.
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#9a9a9a"
INK = "#010203"  # as good as black, and in a page the colour of the text
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "text.parse_math"), False),  # a file's name is no formula
    "axes.titlesize": 9,
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
}
_VARIABLES = {BLUE: "var(--blue)", VERMILION: "var(--vermilion)", GREEN: "var(--green)", GREY: "var(--grey)"}

house_style = matplotlib.rc_context(_STYLE)
"""Decorates a function that makes a figure."""


def new_figure(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of this size in inches; `title` is for readers who do not see it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_label(title)
    return figure, figure.add_subplot()


def line_style(variant: str) -> dict[str, Any]:
    """Return the line of a variant: base, mean or posterior by colour, what was done to it by dashes."""
    colors = {"base": GREY, "mean": VERMILION, "posterior": BLUE}
    color = next((color for name, color in colors.items() if variant.startswith(name)), GREEN)
    return {"color": color, "linestyle": "--" if "temperature" in variant else ":" if "pruned" in variant else "-"}


def save_figures(figures: Mapping[str, Figure | str], folder: Path, reporter: Reporter = SILENT) -> list[Path]:
    """Write each figure into `folder` as NAME.png (150 dots per inch) and NAME.svg, and return the paths.

    In place of a figure that would show nothing there is a line that says why: `reporter` gets it, and files of that
    name, which an earlier run has left, are removed.

    Raises:
        IVONError: a file cannot be written.
    """
    paths = []
    for name, figure in figures.items():
        if isinstance(figure, str):
            reporter.notify(figure)
        for path in (folder / f"{name}.{kind}" for kind in ("png", "svg")):
            if isinstance(figure, str):
                path.unlink(missing_ok=True)
                continue
            with new_file(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:], dpi=150, facecolor="white")
            paths.append(path)
    return paths


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for a page.

    What is ink here is `currentColor` there, and each colour of the palette a variable of the style sheet, so one
    picture serves the light page, the dark one and the printed one.
    """
    title, written = str(figure.get_label()), io.StringIO()
    # The salt goes into the names of what the picture defines: two pictures of a page must not share them.
    page_style = {**_STYLE, "savefig.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": title}
    with matplotlib.rc_context(page_style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts write it
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()[written.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r"#([\w-]+)[)\"]", text))
    text = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in used else "", text)
    for color, variable in {**_VARIABLES, INK: "currentColor", "#000000": "currentColor"}.items():
        text = text.replace(color, variable)
    attributes = (
        f'role="img" aria-label="{html.escape(title)}" fill="currentColor" '
        f'style="--natural: {96 * figure.get_figwidth():.0f}px"'  # in CSS pixels
    )
    return text.replace("<svg", f"<svg {attributes}", 1).replace(">", f"><title>{html.escape(title)}</title>", 1)
