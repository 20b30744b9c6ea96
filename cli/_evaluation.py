"""What `ivon-post eval` and `ivon-post sweep` share: options, progress on stderr, numbers in tables."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import click

from ._common import Command, adapter_argument, json_option, quiet_option, seed_option, silence_libraries


class Numbers(click.ParamType):
    """A comma-separated list of numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers in `value`."""
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number, or numbers with commas between", param, ctx)


class BatchSize(click.ParamType):
    """A number of prompts, or `auto`, which is None."""

    name = "auto|n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or None for `auto`."""
        if value == "auto":
            return None
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither auto nor a number above 0", param, ctx)
        return int(value)


def evaluation_options(command: Command) -> Command:
    """Add the options that say what is evaluated, on what, and how."""
    options = [
        adapter_argument,
        click.option(
            "--data",
            "-d",
            "data",
            multiple=True,
            required=True,
            metavar="FILE",
            help="Chat JSONL as axolotl trains on, one conversation a line; may be given several times.",
        ),
        click.option(
            "--task",
            type=click.Choice(["choice", "generate", "classify"]),
            help="choice: the answer is one of a few strings, by the next token. generate: per-token likelihood "
            "of the reference answer. classify: a sequence-classification head. Default: found from the data.",
        ),
        click.option(
            "--choices", metavar="A,B,…", help="The strings to choose from. Default: the answers in the data."
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT examples of each file."),
        click.option(
            "--samples", "-n", type=click.IntRange(min=1), default=10, show_default=True, help="Draws to average."
        ),
        seed_option("Seed of the draws: those of `sample --seed`."),
        click.option(
            "--base-model", metavar="MODEL", help="Folder or Hub id. Default: what the adapter's config names."
        ),
        click.option("--load-in", type=click.Choice(["8bit", "4bit"]), help="Quantize the base model (bitsandbytes)."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, …"),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Of the base model. auto: float32 on a CPU, the checkpoint's elsewhere.",
        ),
        click.option(
            "--batch-size",
            type=BatchSize(),
            default="auto",
            show_default=True,
            help="Prompts in a batch; halved when the memory runs out.",
        ),
        click.option(
            "--draws-per-pass",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Draws that run in one batch over the shared base model; pays where a batch leaves the hardware idle.",
        ),
        json_option,
        quiet_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


class Reporter:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere (a log, CI), nothing if quiet."""

    _LINE_EVERY = 10.0  # seconds

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._total = self._done = 0
        self._text = ""

    def __enter__(self) -> Reporter:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, quiet=self._quiet)
        if self._console.is_terminal and not self._quiet:
            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True
            ).__enter__()
            self._task = self._bar.add_task("starting", total=None)
        silence_libraries()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.__exit__(kind, error, trace)

    def stage(self, text: str) -> None:
        """Say what is going on now, for as long as it takes."""
        if self._bar:
            self._bar.update(self._task, description=text, total=None)
        else:
            self._console.print(text, highlight=False)

    def begin(self, text: str, total: int) -> Callable[[int], None]:
        """Start counting to `total`; return the function that is told how many more are done."""
        self._text, self._total, self._done = text, total, 0
        self._started = self._printed = time.monotonic()
        if self._bar:
            self._bar.reset(self._task, description=text, total=total)
        else:
            self._console.print(text, highlight=False)
        return self._advance

    def _advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar:
            self._bar.advance(self._task, count)
        elif now - self._printed >= self._LINE_EVERY:
            self._printed = now
            left = (now - self._started) * (self._total / self._done - 1)
            self._console.print(f"{self._text}: {self._done / self._total:.0%}, {left:.0f} s left", highlight=False)

    def notify(self, message: str) -> None:
        """Tell the user something that is not progress."""
        self._console.print(message, style="yellow", highlight=False, markup=False)


def percent(value: float | None, error: float | None = None) -> str:
    """Return a share as percent, with its standard error."""
    return decimal(value and 100 * value, error and 100 * error, 1)


def decimal(value: float | None, error: float | None = None, digits: int = 3) -> str:
    """Return a number, with its standard error."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def is_wide(columns: int) -> bool:
    """Say whether a table that is so wide may be printed: to a file or pipe, or a terminal with room for it."""
    return not sys.stdout.isatty() or shutil.get_terminal_size().columns >= columns


def file_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a short name for each path: the file's, unless two share it."""
    short = {path: path.rsplit("/", 1)[-1] for path in paths}
    names = list(short.values())
    return {path: name if names.count(name) == 1 else path for path, name in short.items()}
