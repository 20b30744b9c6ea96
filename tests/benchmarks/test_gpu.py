"""benchmarks/gpu.py on a CPU, with tiny sizes: every section gives its rows, and a failure is told in its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = "--device cpu --dtype float32 --shapes 135m --setups plain checkpointing --steps 4 --batch 2 --length 16"
TINY += " --held-out 2 --rank 2 --draws 2 --prompts 1 2 --repeats 1"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_section_gives_its_rows(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = run("--model", str(tiny_llama), *TINY.split(), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    sections: dict[str, Any] = {name: part["rows"] for name, part in json.loads(output.read_text())["sections"].items()}
    assert list(sections) == ["kernels", "optimizer", "training", "draws"]
    assert sections["kernels"][0]["passed"] > 20
    assert sections["kernels"][0]["failed"] == 0
    assert [row["optimizer"] for row in sections["optimizer"]] == ["IVONLoRA", "ivon-opt", "AdamW fused"]
    ways = [(row["setup"], row["optimizer"]) for row in sections["training"]]
    assert ways == [(setup, way) for setup in ("plain", "checkpointing") for way in ("AdamW", "IVON")]
    for plain, checkpointed in zip(sections["training"][:2], sections["training"][2:], strict=True):
        # What is computed again in the backward pass is computed at the same draw.
        assert checkpointed["loss, last quarter"] == pytest.approx(plain["loss, last quarter"], rel=1e-3)
        assert checkpointed["held-out NLL"] == pytest.approx(plain["held-out NLL"], rel=1e-3)
    draws = sections["draws"]
    assert [row["prompts"] for row in draws] == [1, 1, 1, 2, 2, 2]
    for in_turn, stacked in ((draws[1], draws[2]), (draws[4], draws[5])):
        assert in_turn["NLL"] == pytest.approx(stacked["NLL"], rel=1e-5)
    assert "## Draws at prediction" in done.stdout
    assert done.stdout.count("| plain |") == 2


def test_a_section_that_fails_says_so_and_the_next_one_runs(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    arguments = ["--model", str(tmp_path / "broken"), *TINY.split(), "--only", "draws", "optimizer"]
    done = run(*arguments)
    assert done.returncode == 1
    assert "| failed |" in done.stdout
    assert "| AdamW fused |" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "line"), [(["--model", "nowhere"], "nowhere: there is no such"), (["--model", "."], "finds no GPU here")]
)
def test_a_mistake_is_one_line(option: list[str], line: str) -> None:
    done = run(*option)
    assert done.returncode == 2
    assert line in done.stderr
