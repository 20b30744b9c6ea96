"""example_configs/smollm2/demo.py: what is reused, what is done again, and when the demo fails."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "example_configs" / "smollm2"))
        yield importlib.import_module("demo")
    for name in ("demo", "prepare_demo"):
        sys.modules.pop(name, None)


@pytest.fixture
def demo(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The driver on a folder of its own, with `run` noting its calls and pretending to train and evaluate."""
    folder = tmp_path / ".demo"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "movie-train.jsonl").write_text("{}\n")
    calls: list[str] = []

    def run(program: str, *arguments: str) -> str:
        calls.append(program)
        if program == "axolotl":
            (folder / "adapter").mkdir()
        return json.dumps({"rows": rows(0.6, 0.8)})

    monkeypatch.setattr(module, "DEMO", folder)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "calls", calls, raising=False)
    return module


def rows(base: float, mean: float) -> list[dict[str, object]]:
    movie = [{"name": "base", "accuracy": base}, {"name": "mean", "accuracy": mean}]
    shifted = [{"name": "base", "accuracy": 0.9}, {"name": "mean", "accuracy": 0.1}]
    return [
        {"data": f".demo/data/{name}.jsonl", **row}
        for name, part in (("movie", movie), ("nyt", shifted))
        for row in part
    ]


def test_what_is_finished_is_reused(demo: ModuleType) -> None:
    for _ in range(2):
        demo.train(demo.DEMO / "adapter", demo.inputs())
        assert demo.evaluate(demo.DEMO / "evaluation.json", demo.inputs()) == rows(0.6, 0.8)
        demo.sweep(demo.DEMO / "sweep", demo.inputs())
    assert demo.calls == ["axolotl", "ivon-post", "ivon-post"]


def test_other_data_means_training_and_evaluating_again(demo: ModuleType) -> None:
    for content in ("a\n", "b\n"):
        (demo.DEMO / "data" / "movie-train.jsonl").write_text(content)
        demo.train(demo.DEMO / "adapter", demo.inputs())
        demo.evaluate(demo.DEMO / "evaluation.json", demo.inputs())
        demo.sweep(demo.DEMO / "sweep", demo.inputs())
    assert demo.calls == ["axolotl", "ivon-post", "ivon-post"] * 2


def test_a_training_that_fails_is_done_again_from_nothing(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    good = demo.run

    def fails(program: str, *arguments: str) -> str:
        good(program, *arguments)
        (demo.DEMO / "adapter" / "half").touch()
        raise SystemExit("axolotl failed")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", fails)
        with pytest.raises(SystemExit, match="axolotl failed"):
            demo.train(demo.DEMO / "adapter", demo.inputs())
    demo.train(demo.DEMO / "adapter", demo.inputs())
    assert demo.calls == ["axolotl", "axolotl"]
    assert not list((demo.DEMO / "adapter").iterdir())


def test_a_program_that_fails_ends_the_demo(module: ModuleType) -> None:
    with pytest.raises(SystemExit, match="python failed with exit status 3"):
        module.run("python", "-c", "raise SystemExit(3)")


@pytest.mark.parametrize(("base", "mean", "passes"), [(0.6, 0.75, True), (0.6, 0.74, False), (0.9, 0.6, False)])
def test_the_mean_must_beat_the_base_model_on_the_movie_snippets(
    module: ModuleType, base: float, mean: float, passes: bool
) -> None:
    complaint = module.judge(rows(base, mean))
    assert (complaint is None) == passes
    assert passes or f"{100 * (mean - base):.1f} points" in complaint
