"""Progress: bars on a terminal, lines now and then elsewhere, nothing if quiet."""

from __future__ import annotations

import time

import pytest
from command_line import process
from rich.console import Console

from ivon_post import _progress
from ivon_post._progress import Progress


def report(progress: Progress, pause: float = 0.0) -> None:
    with progress:
        for _ in range(4):
            progress.advance("pruning", 1, 4)
        time.sleep(pause)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr(_progress, "_BARS_AFTER", 0.01)


def test_bars_on_a_terminal(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    report(Progress(quiet=False), pause=0.3)
    shown = capsys.readouterr()
    assert "pruning" in shown.err
    assert "100%" in shown.err
    assert not shown.out


def test_quick_has_no_bars(terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_progress, "_BARS_AFTER", 60.0)
    begun = time.monotonic()
    report(Progress(quiet=False))
    assert capsys.readouterr().err.strip() == ""
    assert time.monotonic() - begun < 30, "it does not wait for the bars"


def test_nothing_if_quiet(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    report(progress, pause=0.1)
    progress.begin("drawing", 2)(1)
    progress.describe("drawing", "drawing, 1 a second")
    progress.notify("oh")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("advances", "lines"),
    [
        # (seconds since the last, count, total). Begun when the first is done, at 4 s; told at 12 s and 24 s.
        ([(4.0, 1, 8)] * 8, ["38%, 13 s left", "75%, 7 s left"]),
        ([(0.0, 3, 3), (0.0, 1, 3), (20.0, 1, 3)], ["67%, 10 s left"]),  # the same again counts from 0
        ([(20.0, 0, 1), (20.0, 1, 1)], []),  # the end is not told
    ],
)
def test_lines_now_and_then_elsewhere(
    advances: list[tuple[float, int, int]],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now)
    with Progress(quiet=False) as progress:
        for seconds, count, total in advances:
            now += seconds
            progress.advance("pruning", count, total)
    assert capsys.readouterr().err.splitlines() == [f"pruning: {line}" for line in lines]


def test_what_begins_is_told_elsewhere_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=False) as progress:
        advance = progress.begin("evaluating [/bold] x", 4)
        advance(4)
        progress.begin("bootstrap")
        progress.notify("mean: no answer in [/INST] seven")
    told = ["evaluating [/bold] x", "bootstrap", "mean: no answer in [/INST] seven"]
    assert capsys.readouterr().err.splitlines() == told


def test_stages_end_when_the_next_begins_and_can_be_described(terminal: None) -> None:
    with Progress(quiet=False) as progress:
        progress.begin("loading")
        progress.begin("generating", 2)(1)
        progress.describe("generating", "generating, 7 tokens/s")
        first, second = progress._bars.tasks
        assert (first.finished, second.completed, second.description) == (True, 1, "generating, 7 tokens/s")


def test_libraries_are_silent_though_they_are_imported_later() -> None:
    program = """
import logging, os
import ivon_post
@ivon_post.cli.command("probe")
def probe():
    from transformers.utils import logging as transformers_logging
    print(transformers_logging.get_verbosity() == logging.ERROR, transformers_logging.is_progress_bar_enabled())
    print([logging.getLogger(name).isEnabledFor(logging.WARNING) for name in ("torchao", "bitsandbytes")])
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO)  # as it does when it is imported
    logger.warning("noise")
    logger.error("trouble")
before = dict(os.environ)
ivon_post.cli(["probe"], standalone_mode=False)
print(dict(os.environ) == before)
"""
    done = process(program=program, check=True)
    assert done.stdout.splitlines() == ["True False", "[False, False]", "True"]
    assert done.stderr == "trouble\n"
