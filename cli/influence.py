"""`ivon-post influence`: which training rows made the model what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import OutputOptions, adapter_argument, batch_option, limit_option, model_options, output_as_one
from ._stdout import results
from ._tables import emit, number, print_table

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading

_SHOWN = 20
_LONGEST = 60  # characters of a row's text
_SCORES = ("loss", "leverage", "sensitivity", "on")


@click.command("influence")
@adapter_argument
@click.option("--data", "-d", required=True, metavar="FILE", help="What ADAPTER was trained on: chat JSONL.")
@click.option("--on", metavar="FILE", help="Other data, on which rows help or hurt: adds the effect on the loss there.")
@click.option(
    "--by", type=click.Choice(_SCORES), default="sensitivity", show_default=True, help="What makes a row suspicious."
)
@click.option("--keep", type=float, metavar="SHARE", help="Write --data without the most suspicious rows, as -o.")
@click.option("--scores", metavar="FILE", help="What an earlier run wrote with -o, instead of computing it again.")
@limit_option
@model_options
@batch_option("Examples in a batch; fewer when the memory runs out.")
@click.option(
    "--output", "-o", metavar="FILE", help="Write the scores of every row, as JSONL; with --keep, the rows that stay."
)
@click.option("--overwrite", is_flag=True, help="Replace that file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@output_as_one
def command(
    adapter: str,
    data: str,
    on: str | None,
    by: str,
    keep: float | None,
    scores: str | None,
    limit: int | None,
    output: OutputOptions,
    batch_size: int | None,
    loading: Loading,
) -> None:
    """Tell what each row of its training data has done to ADAPTER, from one gradient a row, without retraining.

    \b
      loss         of the answer at the mean, in nats a token
      leverage     variance under σ of the answer's log-odds: how unsure the posterior is of it
      sensitivity  by how much the loss would rise if the row had been left out: how much it hangs on itself
      on           by how much the loss on --on would rise: below 0, the row hurts there

    Prints the twenty most suspicious rows: those with the highest score, of on the lowest. Wrong labels have a high
    loss and a high sensitivity. The predictions are of first order, by a diagonal: trust their order, not their size.
    ADAPTER is a folder or a Hub id and is not modified.

    \b
      ivon-post influence adapter/ --data train.jsonl -o influence.jsonl
      ivon-post influence adapter/ --data train.jsonl --on validation.jsonl --by on -o influence.jsonl
      ivon-post influence adapter/ --data train.jsonl --scores influence.jsonl --keep 0.9 -o clean.jsonl
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.evaluation.examples import check_output
    from axolotl_ivon.influence import attribution as work

    if keep is not None:
        work.check_keep(keep)
        if limit is not None:
            raise IVONError(f"--keep {keep:g} needs the scores of every row; leave --limit out")
        if output.output is None:
            raise IVONError(f"--keep {keep:g} writes the rows that stay; name a file for them with --output")
    elif scores:
        raise IVONError(
            f"--scores {scores}: there is nothing to do with them; give --keep, the share of rows that stay"
        )
    if scores and on:
        raise IVONError(f"--on {on}: --scores has the effect on it, or has not; leave one of them out")
    rows = work.read(scores, "scores") if scores else None
    with_on = any(row["on"] is not None for row in rows) if rows else on is not None
    work.check_by(by, with_on)
    written = output.path(adapter, "") if output.output is not None else None
    if written:
        check_output(written, output.overwrite)
        for name, file in (("data", data), ("on", on), ("scores", scores)):
            if file and Path(file).exists() and written.exists() and written.samefile(file):
                raise IVONError(f"--output {written} is --{name} itself; choose another name")
    facts: dict[str, Any] = {}
    if rows is None:
        with output.progress() as progress:
            found = work.influence(
                adapter, data, on, limit=limit, batch_size=batch_size, loading=loading, reporter=progress
            )
        rows, facts = found.rows, found.facts
    else:
        work.check_same(rows, str(scores), data)
    gone = work.flagged(rows, by, keep) if keep is not None else []
    if written and keep is not None:
        work.save_without(written, data, {rows[i]["line"] for i in gone})
    elif written:
        work.save(written, rows)
    order = work.suspicious(rows, by)
    if output.as_json:
        document = {"adapter": adapter, "data": data, "on": on, "by": by, **facts, "output": output.output}
        emit({**document, "keep": keep, "left_out": gone, "most_suspicious": order[:_SHOWN], "rows": rows})
        return
    _print([rows[i] for i in order[:_SHOWN]], len(rows), by, with_on)
    if written and keep is not None:
        click.echo(f"{len(rows) - len(gone)} rows stay, {len(gone)} are left out, by {by}")
    if written:
        click.echo(written, file=results())
    if keep is None:
        again = [*(["--scores", written] if written else ["--on", on] if by == "on" else []), "--by", by]
        output.suggest("ivon-post", "influence", adapter, "--data", data, *again, "--keep", 0.9, "-o", "clean.jsonl")


def _print(rows: Sequence[Mapping[str, Any]], count: int, by: str, with_on: bool) -> None:
    """Print a table of the most suspicious rows."""
    shown = [name for name in _SCORES if with_on or name != "on"]
    lines = [[f"{row['line']:>5}  {_text(row)}", *(number(row[name]) for name in shown)] for row in rows]
    print_table(
        [" line  answer ← question", *shown], lines, f"the {len(rows)} most suspicious of {count} rows, by {by}"
    )


def _text(row: Mapping[str, Any]) -> str:
    """Return the beginning of a row's answer and question, on one line."""
    answer, question = (" ".join(str(row.get(name, "")).split()) for name in ("answer", "question"))
    text = f"{answer if len(answer) <= _LONGEST // 2 else answer[: _LONGEST // 2] + '…'} ← {question}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
