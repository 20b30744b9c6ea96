"""What the commands on adapter folders share: arguments, output folders, progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Progress = Callable[[str, int, int], None]

adapter_argument = click.argument("adapter", metavar="ADAPTER")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")


def output_options(default: str) -> Callable[[Command], Command]:
    """Add -o (with the name that is used without it in the help), --overwrite, --json and --quiet."""

    def add(command: Command) -> Command:
        for option in (
            quiet_option,
            json_option,
            click.option("--overwrite", is_flag=True, help="Replace the target if it is there."),
            click.option("--output", "-o", metavar="DIR", help=f"Where to write.  [default: {default}]"),
        ):
            command = option(command)
        return command

    return add


def seed_option(text: str) -> Callable[[Command], Command]:
    """Add --seed."""
    return click.option("--seed", type=int, default=0, show_default=True, help=text)


def recommended_option(what: str) -> Callable[[Command], Command]:
    """Add --recommended."""
    return click.option(
        "--recommended", metavar="FILE", help=f"Take {what} from the recommended.json of `ivon-post sweep`."
    )


def settings(
    recommended: str | None, *, tau: float | None = None, ratio: float | None = None, default_ratio: float = 0.0
) -> tuple[float, float]:
    """Return τ and ratio: the options', else the recommendation's, else the defaults."""
    best_tau, best_ratio = 1.0, default_ratio
    if recommended:
        from axolotl_ivon.evaluation.sweep import read_recommended

        best_tau, best_ratio = read_recommended(recommended)
    return best_tau if tau is None else tau, best_ratio if ratio is None else ratio


def complete_criterion(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the pruning criteria that start with what was typed."""
    from axolotl_ivon.posterior.prune import criteria

    return [name for name in criteria() if name.startswith(incomplete)]


def silence_libraries() -> None:
    """Keep the loading bars and notices of transformers and its kin off the terminal; their errors still come."""
    import logging

    from transformers.utils import logging as transformers_logging

    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def target(adapters: Sequence[str], output: str | None, what: str, overwrite: bool) -> Path:
    """Return the folder to write, beside the first input (for a Hub id: here) unless one is named; refused early."""
    from axolotl_ivon.storage.atomic import check_target

    sources = [Path(adapter) for adapter in adapters]
    if output:
        path = Path(output)
    elif sources[0].is_dir():
        named = sources[0] if sources[0].name not in ("", "..") else sources[0].resolve()
        path = named.parent / f"{named.name}-{what}"
    else:
        path = Path(f"{sources[0].name}-{what}")
    check_target(path, overwrite, filter(Path.is_dir, sources))
    return path


@contextlib.contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress | None]:
    """Give the function that the library reports to; after one second, bars show on a terminal's stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}
    begun = time.monotonic()

    def report(doing: str, count: int, total: int) -> None:
        if doing not in tasks:
            tasks[doing] = bars.add_task(doing, total=total)
        bars.advance(tasks[doing], count)
        if not bars.live.is_started and time.monotonic() - begun > 1:
            bars.start()

    try:
        yield report
    finally:
        bars.stop()


def emit(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: the first column left, the others right; plain where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from axolotl_ivon.errors import printable

    console = Console()
    # Somebody who pipes wants every character; a terminal may wrap.
    if not console.is_terminal:
        console = Console(width=1000)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table, highlight=False, markup=False)


def number(value: float | None) -> str:
    """Return a measured number with three significant digits."""
    return "–" if value is None else f"{value:.3g}"
