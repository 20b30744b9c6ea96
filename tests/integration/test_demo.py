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
            (folder / name_of(arguments)).mkdir()
        return json.dumps({"rows": []})

    monkeypatch.setattr(module, "DEMO", folder)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "calls", calls, raising=False)
    return module


def name_of(arguments: tuple[str, ...]) -> str:
    """Return the adapter that `axolotl train` is asked for: what the YAML names, or what takes its place."""
    return Path(arguments[arguments.index("--output-dir") + 1]).name if "--output-dir" in arguments else "ivon"


def lines(base: float, draws: float, nll: float = 0.3, ece: float = 0.02) -> dict[tuple[str, str], dict[str, float]]:
    return {
        ("ivon", "base"): {"accuracy": base},
        ("adamw", "mean"): {"nll": 0.4, "ece": 0.05},
        ("ivon", "posterior"): {"accuracy": draws, "nll": nll, "ece": ece},
    }


def test_what_is_finished_is_reused_unless_the_data_are_others(demo: ModuleType) -> None:
    for content, runs in (("a\n", 2), ("a\n", 2), ("b\n", 4)):
        (demo.DEMO / "data" / "movie-train.jsonl").write_text(content)
        for name in demo.OPTIMIZERS:
            demo.train(name, demo.inputs())
            demo.evaluate(name, demo.inputs())
        assert demo.calls == ["axolotl", "ivon-post"] * runs


def test_the_two_runs_differ_in_their_optimizer_alone(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "run", lambda *arguments: asked.append(arguments))
    for name in demo.OPTIMIZERS:
        demo.train(name, demo.inputs())
    adamw, ivon = asked
    assert adamw == (*ivon, "--optimizer", "adamw_torch", "--output-dir", ".demo/adamw")


def test_a_training_that_fails_is_done_again_from_nothing(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    good = demo.run

    def fails(program: str, *arguments: str) -> str:
        good(program, *arguments)
        (demo.DEMO / "ivon" / "half").touch()
        raise SystemExit("axolotl failed")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", fails)
        with pytest.raises(SystemExit, match="axolotl failed"):
            demo.train("ivon", demo.inputs())
    demo.train("ivon", demo.inputs())
    assert demo.calls == ["axolotl", "axolotl"]
    assert not list((demo.DEMO / "ivon").iterdir())
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="python failed with exit status 3"):
        demo.run("python", "-c", "raise SystemExit(3)")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (lines(0.6, 0.75), None),
        (lines(0.6, 0.74), "by 14.0 points"),
        (lines(0.9, 0.6), "by -30.0 points"),
        (lines(0.5, 0.8, nll=0.4), "NLL is 0.400, AdamW's 0.400: it should be lower"),
        (lines(0.5, 0.8, ece=0.06), "ECE is 0.060, AdamW's 0.050: it should be lower"),
    ],
)
def test_what_the_demo_promises_must_come_true(module: ModuleType, line: object, complaint: str | None) -> None:
    said = module.judge(line)
    assert (said is None) == (complaint is None)
    assert complaint is None or complaint in said


def test_the_picture_counts_confident_errors(demo: ModuleType) -> None:
    for name, row in (("adamw", "mean"), ("ivon", "posterior")):
        told = [(0.95, False), (0.91, True), (0.9, True), (0.6, False)]
        text = "".join(json.dumps({"rows": {row: {"confidence": c, "right": r}}}) + "\n" for c, r in told)
        (demo.DEMO / f"examples-{name}.jsonl").write_text(text)
    assert demo.answers(("adamw", "mean"))[0] == (0.95, False)
    assert demo.draw(demo.DEMO / "picture.png").read_bytes().startswith(b"\x89PNG")
