"""Who may import whom (the contracts in pyproject.toml), and that every module has a test of its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def namesake(module: Path) -> Path:
    """Return where the test of a module is looked for: `cli/_options.py` has `tests/cli/test_options.py`."""
    inside = module.relative_to(ROOT)
    folders = inside.parent.parts if inside.parts[0] == "cli" else inside.parent.parts[1:]
    return ROOT.joinpath("tests", *folders, f"test_{module.stem.lstrip('_')}.py")


MODULES = [
    path
    for package in ("axolotl_ivon", "cli")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.stem[:2] != "__"
]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_namesake(module: Path) -> None:
    assert namesake(module).is_file(), f"{namesake(module).relative_to(ROOT)} is missing"


def test_imports_keep_the_contracts() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " 0 broken" in checked.stdout
