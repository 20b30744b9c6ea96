"""Results on stdout: JSON documents, tables, and the numbers in them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import click

from axolotl_ivon.errors import printable
from axolotl_ivon.metrics.verdict import METRICS, measured

from ._stdout import results


def emit(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2, allow_nan=False), file=results())


def as_number(text: str) -> int | float | str:
    """Return the number that a fact of a header is, or the text: versions, fingerprints and infinity are no numbers."""
    if not re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?(e[+-]?\d{1,3})?", text):
        return text
    value = float(text)
    return int(text) if text.lstrip("-").isdecimal() else value if math.isfinite(value) else text


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: the first column left, the others right; plain where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=results())
    # Somebody who pipes wants every character; a terminal may wrap.
    if not console.is_terminal:
        console = Console(file=results(), width=1000)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table, highlight=False, markup=False)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values in two columns, and an empty line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{printable(name):<{width}}  {printable(value)}")
    click.echo()


def marks(**are_set: bool) -> str:
    """Return the names of the marks that a row has, for its last cell."""
    return " ".join(name for name, is_set in are_set.items() if is_set)


def answered(coverage: float | None, threshold: float | None) -> str:
    """Return, for the end of a line, the share of answers above the threshold; nothing where all is answered."""
    if coverage is None:
        return ""
    return f"; answers {percent(coverage)} %, and abstains below confidence {threshold:.4g}"


def number(value: float | None) -> str:
    """Return a measured number with three significant digits."""
    return "–" if value is None else f"{value:.3g}"


def percent(value: float | None, error: float | None = None) -> str:
    """Return a share as percent, with its standard error."""
    return measured(value, error, 100, 1)


def decimal(value: float | None, error: float | None = None) -> str:
    """Return a number, with its standard error."""
    return measured(value, error)


def heads(metrics: Sequence[str]) -> list[str]:
    """Return the headings of metrics."""
    return [METRICS[metric].short + " %" * METRICS[metric].percent for metric in metrics]


def is_wide(columns: int) -> bool:
    """Say whether a table that is so wide may be printed: to a file or pipe, or a terminal with room for it."""
    return not results().isatty() or shutil.get_terminal_size().columns >= columns
