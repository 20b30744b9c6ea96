"""`ivon-post influence`: which training rows made the model what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _options as options
from ._stdout import results
from ._tables import emit, number, print_table

if TYPE_CHECKING:
    from axolotl_ivon.records.influence import InfluenceRecord

_SHOWN = 20
_LONGEST = 60  # characters of a row's text
_SCORES = ("loss", "leverage", "sensitivity", "on")


@click.command("influence", cls=options.Sectioned)
@options.adapter_argument
@click.option("--data", "-d", required=True, metavar="FILE", help="Training data of ADAPTER: chat JSONL.")
@click.option("--on", metavar="FILE", help="Other data: adds the effect of each row on the loss there.")
@options.option("--by", type=click.Choice(_SCORES), default="sensitivity", help="Score that ranks the rows.")
@click.option("--keep", type=float, metavar="SHARE", help="Share of rows that stay: writes them to --output.")
@click.option("--scores", metavar="FILE", help="With --keep: reuse the scores that an earlier run wrote.")
@options.limit_option
@options.model_options
@options.output_options(
    None, "JSONL for the scores of every row, or with --keep for the rows that stay.", metavar="FILE"
)
def command(
    adapter: str,
    data: str,
    on: str | None,
    by: str,
    keep: float | None,
    scores: str | None,
    limit: int | None,
    loading: options.Loading,
    output: options.OutputOptions,
) -> None:
    """Score how each training row shaped the adapter.

    Takes one gradient per row and no retraining. The scores of a row are

    \b
      loss         of the answer at the mean, in nats per token
      leverage     variance of the answer's log-odds under σ: how unsure the posterior is about it
      sensitivity  how much the loss of the row would rise if the row had been left out
      on           how much the loss on --on would rise if the row had been left out; below 0 the row hurts

    Prints the rows that stand out from the others, at most twenty: those with the highest score, or with the lowest
    for `on`. Wrong labels have a high loss and a high sensitivity. The scores are first-order estimates: trust their
    order, not their size. ADAPTER is a folder or a Hub id and is not modified.

    \b
      ivon-post influence adapter/ --data train.jsonl -o influence.jsonl
      ivon-post influence adapter/ --data train.jsonl --on validation.jsonl --by on -o influence.jsonl
      ivon-post influence adapter/ --data train.jsonl --scores influence.jsonl --keep 0.9 -o clean.jsonl
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.influence import influence as compute
    from axolotl_ivon.influence import ranking
    from axolotl_ivon.posterior.adapter import Adapter
    from axolotl_ivon.records.base import save_lines
    from axolotl_ivon.records.influence import load
    from axolotl_ivon.storage.atomic import check_file

    if keep is not None:
        ranking.check_keep(keep)
        if limit is not None:
            raise IVONError(f"--keep {keep:g} needs the scores of every row; leave --limit out")
        if output.output is None:
            raise IVONError(f"--keep {keep:g} writes the rows that stay; name a file for them with --output")
    elif scores:
        raise IVONError(f"--scores {scores} are used only with --keep, the share of rows that stay; give both")
    if scores and on:
        raise IVONError(f"--on {on}: --scores reuses earlier scores, so --on is not computed; leave one of them out")
    rows = load(scores, "scores", Adapter(adapter).metadata) if scores else None
    with_on = any(row.on is not None for row in rows) if rows else on is not None
    ranking.check_by(by, with_on)
    written = output.given_path(adapter, data=data, on=on, scores=scores)
    if written:
        check_file(written, output.overwrite)
    summary: dict[str, Any] = {}
    if rows is None:
        with output.progress() as progress:
            result = compute(adapter, data, on, limit=limit, loading=loading, reporter=progress)
        rows, summary = result.rows, result.summary
    else:
        ranking.check_same(rows, str(scores), data)
    gone = ranking.flagged(rows, by, keep) if keep is not None else []
    if written and keep is not None:
        ranking.save_without(written, data, {rows[i].line or 0 for i in gone})
    elif written:
        save_lines(written, rows)
    order, out = ranking.suspicious(rows, by), ranking.standing_out(rows, by)
    if output.as_json:
        document = {"adapter": adapter, "data": data, "on": on, "by": by, **summary, "output": output.output}
        document |= {"keep": keep, "left_out": gone, "most_suspicious": order[:_SHOWN], "stand_out": out}
        emit({**document, "rows": [row.dump() for row in rows]})
        return
    shown = [name for name in _SCORES if with_on or name != "on"]
    lines = [[f"{rows[i].line:>5}  {_text(rows[i])}", *map(number, map(rows[i].score, shown))] for i in out[:_SHOWN]]
    title = f"{len(out)} of {len(rows)} rows stand{'s' * (len(out) == 1)} out by {by}"
    if out:
        more = f"; the {len(lines)} most suspicious" if len(out) > len(lines) else ""
        print_table([" line  answer ← question", *shown], lines, title + more)
    elif keep is None:
        click.echo(f"no row stands out by {by}, of {len(rows)}: nothing to leave out")
    if written and keep is not None:
        click.echo(f"{len(rows) - len(gone)} rows stay, {len(gone)} are left out, by {by}")
    if written:
        click.echo(written, file=results())
    if keep is None and out:
        stay = round(1 - len(out) / len(rows), 6)
        again = [*(["--scores", written] if written else ["--on", on] if by == "on" else []), "--by", by]
        output.suggest("ivon-post", "influence", adapter, "--data", data, *again, "--keep", stay, "-o", "clean.jsonl")


def _text(row: InfluenceRecord) -> str:
    """Return the beginning of a row's answer and question, on one line."""
    answer, question = (" ".join((text or "").split()) for text in (row.answer, row.question))
    text = f"{answer if len(answer) <= _LONGEST // 2 else answer[: _LONGEST // 2] + '…'} ← {question}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
