"""Sphinx configuration: `make docs`."""

import json
import re
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

project = "axolotl-ivon"
author = "The axolotl-ivon authors"
version = release = re.findall(r'^version = "(.+)"$', PYPROJECT.read_text(encoding="utf-8"), re.M)[0]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_click"]
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


def formats() -> str:
    """Return the fields of every document in `axolotl_ivon.records`, from the JSON schemas of their types."""
    from axolotl_ivon.records.decision import Decision
    from axolotl_ivon.records.ensemble import EnsembleRecord
    from axolotl_ivon.records.evaluation import EvaluationRecord, ExampleRecord
    from axolotl_ivon.records.influence import InfluenceRecord
    from axolotl_ivon.records.nbest import NBestRecord, NBestSettings
    from axolotl_ivon.records.recommendation import Recommendation

    documents = {
        "`eval --json`": EvaluationRecord,
        "A line of `eval --output`": ExampleRecord,
        "A line of `predict`": Decision,
        "`recommended.json`": Recommendation,
        "A line of `influence --output`": InfluenceRecord,
        "`ensemble.json`": EnsembleRecord,
        "A line of `generate --output`": NBestRecord,
        "The settings beside that file": NBestSettings,
    }
    parts: list[str] = []
    shown: set[str] = set()
    for title, record in documents.items():
        schema = record.model_json_schema()
        parts += [f"## {title}", *_fields(schema)]
        for name, inner in schema.get("$defs", {}).items():
            if name not in shown:
                parts += [f"### {name}", *_fields(inner)]
                shown.add(name)
    return "\n\n".join(parts)


def _fields(schema: dict[str, Any]) -> list[str]:
    rows = ["| field | type | default |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else f"`{json.dumps(field['default'])}`"
        rows.append(f"| `{name}` | {_type(field)} | {'' if '{' in default else default} |")
    return [schema["description"].split("\n\n")[0], "\n".join(rows)]


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"].rsplit("/", 1)[-1])
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "const" in field:
        return f'`"{field["const"]}"`'
    inner = field.get("items") or field.get("additionalProperties")
    return f"{field['type']} of {_type(inner)}" if isinstance(inner, dict) else str(field["type"])


def insert_tables(app: Any, page: str, source: list[str]) -> None:
    """Put what is generated into its page."""
    if page == "formats":
        source[0] = source[0].replace("{{ formats }}", formats())


def options_to_restructured_text(app: Any, context: Any, lines: list[str]) -> None:
    """Escape in a command's help what reStructuredText would read as markup."""
    markup = (".. ", ":")  # written by sphinx-click itself
    lines[:] = [line if line.lstrip().startswith(markup) else re.sub(r"[`|*]", r"\\\g<0>", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("source-read", insert_tables)
    for part in ("description", "usage", "options", "arguments", "envvars", "epilog"):
        app.connect(f"sphinx-click-process-{part}", options_to_restructured_text)
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # before napoleon's
