"""Sphinx configuration: `make docs`."""

import re
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

project = "axolotl-ivon"
author = "The axolotl-ivon authors"
version = release = re.findall(r'^version = "(.+)"$', PYPROJECT.read_text(encoding="utf-8"), re.M)[0]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# What the library works without has no part in its documentation.
autodoc_mock_imports = ["axolotl", "lm_eval"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "axolotl-ivon"
html_show_sourcelink = False
html_theme_options = {"navbar_center": [], "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}
html_sidebars = {"**": ["pages"]}
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["custom.css"]


def to_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: `code`, |m|, and an indented block after a blank line is code."""
    made: list[str] = []
    before, code = 0, None  # the indentation of the last line of text, and that of the block of code
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip():
            if code is not None and indent < code:
                code = None
            if code is None and i and not lines[i - 1].strip() and indent >= before + 4:
                made += [" " * before + "::", ""]
                code = indent
            if code is None:
                before = indent
                line = re.sub(r"`([^`]+)`", r"``\1``", line)
                line = re.sub(
                    r"``[^`]+``|[|*]", lambda found: found[0] if found[0][0] == "`" else "\\" + found[0], line
                )
        made.append(line)
    lines[:] = made


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # before napoleon's
