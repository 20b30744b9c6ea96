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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and nothing in it but the sources gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("axolotl_ivon", "cli", "pyproject.toml", "README.md", "LICENSE", "tests", "benchmarks"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    [built] = out.iterdir()
    return built


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "axolotl_ivon").rglob("*.py")}
    expected |= {f"ivon_post/{path.name}" for path in (ROOT / "cli").glob("*.py")}
    expected |= {"axolotl_ivon/py.typed", "axolotl_ivon/report/page.html.jinja", "ivon_post/py.typed"}
    expected |= {"axolotl_ivon/serving/page.html"}
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


def test_the_wheel_works_alone_and_without_axolotl(wheel: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    (site / "sitecustomize.py").write_text(BLOCK)

    def run(*words: object) -> str:
        command = [sys.executable, str(site / "bin" / "ivon-post"), *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import axolotl_ivon, ivon_post; print(axolotl_ivon.__file__, ivon_post.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.count(str(site)) == 2
    assert "info" in run("--help")
    assert json.loads(run("info", tiny_adapter, "--json"))["weights"] == 896
    run("prune", tiny_adapter, "-o", tmp_path / "pruned")
    run("merge", tiny_adapter, "-o", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
