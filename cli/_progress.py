"""Progress on stderr."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import click

from axolotl_ivon.errors import printable
from axolotl_ivon.reporter import Reporter

from ._stdout import only_results

_BARS_AFTER = 1.0  # seconds: a quick command shows none
_LINE_EVERY = 10.0  # seconds


_NOTES = "ivon_post.notes"


def hold(line: str) -> None:
    """Keep a line for stderr until the command reports anything, so that no error comes after it."""
    click.get_current_context().meta.setdefault(_NOTES, []).append(line)


def held() -> list[str]:
    """Return the lines that were kept, each once."""
    context = click.get_current_context(silent=True)
    return context.meta.pop(_NOTES, []) if context else []


class Progress(Reporter):
    """Progress on stderr: bars on a terminal, a line now and then elsewhere (a log, CI), nothing if quiet.

    Inside of it stdout is kept for results.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._tasks: dict[str, Any] = {}  # rich's, by what is done
        self._stdout = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        from rich import progress
        from rich.console import Console

        self._stdout.enter_context(only_results())
        self._console = Console(stderr=True, quiet=self._quiet)
        self._printed = time.monotonic()
        self._bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
            get_time=time.monotonic,
            transient=True,
        )
        self._has_bars = self._console.is_terminal and not self._quiet  # else they only count
        if self._has_bars:
            self._timer = threading.Timer(_BARS_AFTER, self._bars.start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stdout:
            if self._has_bars:
                self._timer.cancel()
                self._timer.join()  # or it may start the bars after they were stopped
                self._bars.stop()

    def advance(self, doing: str, count: int, total: int) -> None:
        """Report that `count` more of `total` are done."""
        self._say_held()
        task = self._tasks.get(doing)
        if task is None:
            for other in self._bars.tasks:  # what had no known length has ended
                if other.total is None:
                    self._bars.update(other.id, total=1, completed=1)
            number = self._bars.add_task(doing, total=total or None)
            task = self._tasks[doing] = self._bars.tasks[number]
        elif 0 < total <= task.completed:  # the same again, with another adapter
            self._bars.reset(task.id, total=total)
        self._bars.advance(task.id, count)
        is_due = time.monotonic() - self._printed >= _LINE_EVERY
        if is_due and not self._has_bars and 0 < task.completed < total:
            self._printed = time.monotonic()
            left = (task.elapsed or 0.0) * (total / task.completed - 1)
            self.say(f"{task.description}: {task.completed / total:.0%}, {left:.0f} s left")

    def begin(self, doing: str, total: int = 0) -> Callable[[int], None]:
        """Announce what takes a while, and return the function that is told how many more of `total` are done."""
        self.advance(doing, 0, total)
        if not self._has_bars:
            self.say(doing)
        return lambda count: self.advance(doing, count, total)

    def describe(self, doing: str, text: str) -> None:
        """Show `text` where `doing` stands."""
        if doing in self._tasks:
            self._bars.update(self._tasks[doing].id, description=text)

    def notify(self, message: str) -> None:
        """Tell the user something that is not progress."""
        self.say(message, style="yellow")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line on stderr."""
        self._say_held()
        self._print(text, style)

    def _say_held(self) -> None:
        for line in held():
            self._print(printable(line))

    def _print(self, text: str, style: str | None = None) -> None:
        # A file name or what a model wrote is no markup.
        self._console.print(text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal, style=style)


def silence_libraries() -> None:
    """Keep bars and notices of transformers and its kin, imported or not, off the terminal unless the user asks."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets its own level when it is imported
    ours = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in ours.keys() - os.environ.keys():
        os.environ[name] = ours[name]
        click.get_current_context().call_on_close(functools.partial(os.environ.pop, name, None))
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
