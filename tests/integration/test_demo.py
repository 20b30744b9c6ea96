"""example_configs/smollm2/demo.py: what is reused, what is done again, and when the demo fails."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

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

    def run(program: str, *arguments: str, log: Path | None = None) -> str:
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
    monkeypatch.setattr(demo, "run", lambda *arguments, log: asked.append(arguments))
    for name in demo.OPTIMIZERS:
        demo.train(name, demo.inputs())
    adamw, ivon = asked
    assert adamw == (*ivon, "--optimizer", "adamw_torch", "--output-dir", ".demo/adamw")


def test_a_training_that_fails_is_done_again_from_nothing(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    good = demo.run

    def fails(program: str, *arguments: str, log: Path | None = None) -> str:
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


def test_the_picture_shows_shares_and_how_seldom_it_is_sure(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        ("adamw", "mean"): [(0.95, False)] * 20 + [(0.91, True)] * 180 + [(0.6, False)] * 100,
        ("adamw", "mean+temperature"): [(0.9, True)] * 59 + [(0.99, False)] + [(0.89, False)] * 240,
        ("ivon", "posterior"): [(0.8, True)] * 300,
    }
    for name in ("adamw", "ivon"):
        rows = {row: answers for (adapter, row), answers in told.items() if adapter == name}
        examples = [
            {row: {"confidence": answers[i][0], "right": answers[i][1]} for row, answers in rows.items()}
            for i in range(300)
        ]
        text = "".join(json.dumps({"rows": row}) + "\n" for row in examples)
        (demo.DEMO / f"examples-{name}.jsonl").write_text(text)
    assert demo.answers(("adamw", "mean"))[0] == (0.95, False)
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    assert demo.draw(demo.DEMO / "picture.png").read_bytes().startswith(b"\x89PNG")
    [figure] = figures
    [axes] = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([10, 100 / 60, 0])
    assert [text.get_text() for text in axes.texts] == [
        "10 % wrong\n20 of the 200 that it is sure of, of 300",
        "2 % wrong\n1 of the 60 that it is sure of, of 300",
        "never so sure, in 300 answers",
    ]
    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in [*axes.texts, axes.title])


def test_the_log_goes_to_a_file_and_the_loss_to_the_screen(
    module: ModuleType, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    code = """print("config:", {"a": 1}); print("{'loss': '0.5231', 'grad_norm': '1', 'epoch': '1.25'}")"""
    assert "config" in module.run("python", "-c", code, log=tmp_path / "train.log")
    assert capsys.readouterr().out.splitlines()[1:] == ["epoch  1.2   loss 0.523"]
    assert "config: {'a': 1}" in (tmp_path / "train.log").read_text()
    with pytest.raises(SystemExit, match=r"(?s)too bad.*python failed with exit status 1; see .*train\.log"):
        module.run("python", "-c", "raise SystemExit('too bad')", log=tmp_path / "train.log")
