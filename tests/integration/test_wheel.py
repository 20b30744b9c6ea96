"""What is built for users: the wheel holds the two packages and nothing else, and works alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution and the wheel built from it; made from a copy, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in")
    for name in ("axolotl_ivon", "cli", "tests", "benchmarks", *files):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_the_package_index_would_take_both(built: Path) -> None:
    twine = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, built.iterdir())]
    checked = subprocess.run(twine, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout.count("PASSED")) == (0, 2), checked.stdout


def test_the_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    library = ROOT / "axolotl_ivon"
    expected = {
        str(path.relative_to(ROOT)) for kind in ("py", "typed", "jinja", "html") for path in library.rglob(f"*.{kind}")
    }
    expected |= {f"ivon_post/{path.name}" for path in (*(ROOT / "cli").glob("*.py"), ROOT / "cli/py.typed")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [info] = {name.split("/")[0] for name in names if ".dist-info/" in name}
        expected |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
        expected |= {f"{info}/licenses/LICENSE"}
        assert names == expected
        for name in names - {f"{info}/RECORD"}:
            assert str(ROOT).encode() not in archive.read(name)
        assert "ivon-post = ivon_post:main" in archive.read(f"{info}/entry_points.txt").decode()


BLOCK = """
import sys
for name in ("axolotl", "trl", "datasets", "deepspeed", "bitsandbytes", "vllm", "lm_eval"):
    sys.modules[name] = None  # which is how Python notes that there is no such module
"""


def test_the_wheel_works_alone_and_without_axolotl(built: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    (site / "sitecustomize.py").write_text(BLOCK)

    def run(*words: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import axolotl_ivon, ivon_post; print(axolotl_ivon.__file__, ivon_post.__file__)"
    assert run("-c", where).count(str(site)) == 2
    ivon_post = site / "bin" / "ivon-post"
    assert "info" in run(ivon_post, "--help")
    assert json.loads(run(ivon_post, "info", tiny_adapter, "--json"))["weights"] == 896
    run(ivon_post, "prune", tiny_adapter, "-o", tmp_path / "pruned")
    run(ivon_post, "merge", tiny_adapter, "-o", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
