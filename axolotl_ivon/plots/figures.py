"""What the figures of reports share: colours, and files that are whole or not there.

Figures are made without pyplot, so nothing global changes and no display is needed. Importing this module imports no
matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.atomic import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the palette by Okabe and Ito, which the colour-blind tell apart.
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#9a9a9a"


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `figure` into `folder` as NAME.png (150 dots per inch) and NAME.svg, and return the two paths.

    Raises:
        IVONError: a file cannot be written.
    """
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with new_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return paths
