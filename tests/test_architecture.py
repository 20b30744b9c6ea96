"""Who may import whom (the contracts in pyproject.toml), and that a test covers every module."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import axolotl_ivon

ROOT = Path(__file__).resolve().parents[1]


# No test names anything of these: they are tested through what they are parts of.
THROUGH_OTHERS = {
    "axolotl_ivon/evaluation/predict.py": "evaluation.evaluate",
    "axolotl_ivon/optim/buffers.py": "optim.ivon",
    "axolotl_ivon/optim/summary.py": "optim.ivon",
    "axolotl_ivon/training/default_hooks.py": "training.attach",
    "axolotl_ivon/training/patches.py": "training.attach",
    "axolotl_ivon/training/saved.py": "training.checkpoints",
}


@functools.cache
def imported_by_tests() -> set[str]:
    """Return the dotted names that the tests import, and the words that they run `ivon-post` with."""
    names = set[str]()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                homes = axolotl_ivon._HOME if node.module == "axolotl_ivon" else {}
                names |= {node.module, *(f"{node.module}.{homes.get(a.name, a.name)}" for a in node.names)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ivon_post") and node.args:
                names.add(f"ivon_post.{ast.unparse(node.args[0]).strip(chr(39))}")
    return names


MODULES = [
    path
    for package in ("axolotl_ivon", "cli")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.stem[:2] != "__"
]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_test(module: Path) -> None:
    """One in its own file, or in any that imports the module or one of its names; of a command, one that runs it."""
    inside = module.relative_to(ROOT)
    package, *rooms = inside.with_suffix("").parts
    folders = [package, *rooms[:-1]] if package == "cli" else rooms[:-1]
    own_file = ROOT.joinpath("tests", *folders, f"test_{module.stem.lstrip('_')}.py")
    dotted = ".".join(["ivon_post" if package == "cli" else package, *rooms])
    tested = own_file.is_file() or dotted in imported_by_tests()
    assert tested is (str(inside) not in THROUGH_OTHERS)


def test_imports_keep_the_contracts() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " 0 broken" in checked.stdout
