"""Figures as files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from axolotl_ivon import IVONError
from axolotl_ivon.plots.figures import save_figure


def test_a_figure_is_saved_as_png_and_svg(tmp_path: Path) -> None:
    png, svg = save_figure(Figure(), tmp_path, "a.b")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [png.name, svg.name] == ["a.b.png", "a.b.svg"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    with pytest.raises(IVONError, match="cannot be written"):
        save_figure(Figure(), png, "below")


def test_importing_it_imports_no_matplotlib() -> None:
    code = "import sys, axolotl_ivon.plots.figures; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
