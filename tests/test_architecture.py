"""Who may import whom (the contracts in pyproject.toml), and that a test file covers every module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def places_of(module: Path) -> list[Path]:
    """Return where a module may be tested: in a file of its name (`cli/_options.py`: test_options.py) or its room's."""
    inside = module.relative_to(ROOT)
    folders = inside.parent.parts if inside.parts[0] == "cli" else inside.parent.parts[1:]
    room = folders[-1] if folders else "library"
    names = (module.stem.lstrip("_"), room)
    return [ROOT.joinpath("tests", *folders, f"test_{name}.py") for name in names]


MODULES = [
    path
    for package in ("axolotl_ivon", "cli")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.stem[:2] != "__"
]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_test_file(module: Path) -> None:
    places = places_of(module)
    assert any(map(Path.is_file, places)), " or ".join(str(path.relative_to(ROOT)) for path in places) + " is missing"


def test_imports_keep_the_contracts() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " 0 broken" in checked.stdout
