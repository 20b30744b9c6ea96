"""`ivon-post influence`: which training rows made the model what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    OutputOptions,
    Sectioned,
    adapter_argument,
    as_one,
    json_and_quiet,
    limit_option,
    model_options,
    output_as_one,
)
from ._stdout import results
from ._tables import emit, number, print_table

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading
    from axolotl_ivon.records.influence import InfluenceRecord

_SHOWN = 20
_LONGEST = 60  # characters of a row's text
_SCORES = ("loss", "leverage", "sensitivity", "on")


@dataclass(frozen=True)
class Selection:
    """How rows are ranked, and which of them stay: what --by, --keep, --scores and --limit say."""

    by: str
    keep: float | None
    scores: str | None
    limit: int | None

    def check(self, on: str | None, output: str | None) -> None:
        """Raise IVONError if options do not go together."""
        from axolotl_ivon.errors import IVONError
        from axolotl_ivon.influence.ranking import check_keep

        if self.keep is not None:
            check_keep(self.keep)
            if self.limit is not None:
                raise IVONError(f"--keep {self.keep:g} needs the scores of every row; leave --limit out")
            if output is None:
                raise IVONError(f"--keep {self.keep:g} writes the rows that stay; name a file for them with --output")
        elif self.scores:
            raise IVONError(f"--scores {self.scores} are used only with --keep, the share of rows that stay; give both")
        if self.scores and on:
            raise IVONError(f"--on {on}: --scores has the effect on it, or has not; leave one of them out")


@click.command("influence", cls=Sectioned)
@adapter_argument
@click.option("--data", "-d", required=True, metavar="FILE", help="Training data of ADAPTER: chat JSONL.")
@click.option("--on", metavar="FILE", help="Other data: adds the effect of each row on the loss there.")
@click.option(
    "--by", type=click.Choice(_SCORES), default="sensitivity", show_default=True, help="Score that ranks the rows."
)
@click.option("--keep", type=float, metavar="SHARE", help="Write --data without the most suspicious rows to --output.")
@click.option("--scores", metavar="FILE", help="Scores that an earlier run wrote with --output, instead of new ones.")
@limit_option
@model_options
@click.option(
    "--output", "-o", metavar="FILE", help="JSONL for the scores of every row, or with --keep for the rows that stay."
)
@click.option("--overwrite", is_flag=True, help="Replace the target if it exists.")
@json_and_quiet
@output_as_one
@as_one("selection", Selection, "by", "keep", "scores", "limit")
def command(
    adapter: str, data: str, on: str | None, selection: Selection, output: OutputOptions, loading: Loading
) -> None:
    """Score how each training row shaped the adapter.

    Takes one gradient per row and no retraining. The scores of a row are

    \b
      loss         of the answer at the mean, in nats per token
      leverage     variance of the answer's log-odds under σ: how unsure the posterior is about it
      sensitivity  how much the loss of the row would rise if the row had been left out
      on           how much the loss on --on would rise if the row had been left out; below 0 the row hurts

    Prints the twenty most suspicious rows: those with the highest score, or with the lowest for `on`. Wrong labels have
    a high loss and a high sensitivity. The scores are first-order estimates: trust their order, not their size.
    ADAPTER is a folder or a Hub id and is not modified.

    \b
      ivon-post influence adapter/ --data train.jsonl -o influence.jsonl
      ivon-post influence adapter/ --data train.jsonl --on validation.jsonl --by on -o influence.jsonl
      ivon-post influence adapter/ --data train.jsonl --scores influence.jsonl --keep 0.9 -o clean.jsonl
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.influence import influence as compute
    from axolotl_ivon.influence import ranking
    from axolotl_ivon.records.base import save_lines
    from axolotl_ivon.records.influence import load
    from axolotl_ivon.storage.atomic import check_file

    selection.check(on, output.output)
    by, keep, scores = selection.by, selection.keep, selection.scores
    rows = load(scores, "scores") if scores else None
    with_on = any(row.on is not None for row in rows) if rows else on is not None
    ranking.check_by(by, with_on)
    written = output.path(adapter, "") if output.output is not None else None
    if written:
        check_file(written, output.overwrite)
        for name, file in (("data", data), ("on", on), ("scores", scores)):
            if file and Path(file).exists() and written.exists() and written.samefile(file):
                raise IVONError(f"--output {written} is --{name} itself; choose another name")
    summary: dict[str, Any] = {}
    if rows is None:
        with output.progress() as progress:
            result = compute(adapter, data, on, limit=selection.limit, loading=loading, reporter=progress)
        rows, summary = result.rows, result.summary
    else:
        ranking.check_same(rows, str(scores), data)
    gone = ranking.flagged(rows, by, keep) if keep is not None else []
    if written and keep is not None:
        ranking.save_without(written, data, {rows[i].line or 0 for i in gone})
    elif written:
        save_lines(written, rows)
    order = ranking.suspicious(rows, by)
    if output.as_json:
        document = {"adapter": adapter, "data": data, "on": on, "by": by, **summary, "output": output.output}
        document |= {"keep": keep, "left_out": gone, "most_suspicious": order[:_SHOWN]}
        emit({**document, "rows": [row.dump() for row in rows]})
        return
    _print([rows[i] for i in order[:_SHOWN]], len(rows), by, with_on)
    if written and keep is not None:
        click.echo(f"{len(rows) - len(gone)} rows stay, {len(gone)} are left out, by {by}")
    if written:
        click.echo(written, file=results())
    if keep is None:
        again = [*(["--scores", written] if written else ["--on", on] if by == "on" else []), "--by", by]
        output.suggest("ivon-post", "influence", adapter, "--data", data, *again, "--keep", 0.9, "-o", "clean.jsonl")


def _print(rows: Sequence[InfluenceRecord], count: int, by: str, with_on: bool) -> None:
    """Print a table of the most suspicious rows."""
    shown = [name for name in _SCORES if with_on or name != "on"]
    lines = [[f"{row.line:>5}  {_text(row)}", *(number(row.score(name)) for name in shown)] for row in rows]
    print_table(
        [" line  answer ← question", *shown], lines, f"the {len(rows)} most suspicious of {count} rows, by {by}"
    )


def _text(row: InfluenceRecord) -> str:
    """Return the beginning of a row's answer and question, on one line."""
    answer, question = (" ".join((text or "").split()) for text in (row.answer, row.question))
    text = f"{answer if len(answer) <= _LONGEST // 2 else answer[: _LONGEST // 2] + '…'} ← {question}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
