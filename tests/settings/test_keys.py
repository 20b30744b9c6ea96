"""The YAML keys, held against the table that a user reads."""

from __future__ import annotations

import re
from pathlib import Path

from axolotl_ivon.settings.keys import BY_PRESET, DEFAULTS, IVONArgs

ROOT = Path(__file__).parents[2]
HEADER = "| key | default | meaning |"


def test_the_table_of_keys_has_every_key_with_its_default() -> None:
    pages = [path for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")) if HEADER in path.read_text()]
    assert len(pages) == 1
    table = pages[0].read_text().partition(HEADER)[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    rows = {name: cell if name in BY_PRESET else cell.strip("`") for name, cell in rows.items()}
    expected = {
        name: f"{value:g}" if isinstance(value, float) else str(value).lower() for name, value in DEFAULTS.items()
    }
    assert rows == expected | BY_PRESET
    assert rows.keys() == IVONArgs.model_fields.keys()


def test_the_descriptions_name_the_defaults() -> None:
    for name, value in DEFAULTS.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
        assert f"Default: {shown}." in str(IVONArgs.model_json_schema()["properties"][name]["description"])
