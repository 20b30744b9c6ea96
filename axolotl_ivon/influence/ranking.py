"""Training rows ranked by a score, and their data without the most suspicious ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..data.chats import read_examples
from ..errors import IVONError, param_ref
from ..metrics.outliers import outliers
from ..records.influence import InfluenceRecord
from ..storage.atomic import new_file


def suspicious(rows: Sequence[InfluenceRecord], by: str) -> list[int]:
    """Return the numbers of the rows that have a score, the most suspicious first: `on` upwards, others downwards."""
    sign = 1 if by == "on" else -1
    scores = {number: score for number, row in enumerate(rows) if (score := row.score(by)) is not None}
    return sorted(scores, key=lambda number: sign * scores[number])


def standing_out(rows: Sequence[InfluenceRecord], by: str) -> list[int]:
    """Return the numbers of the rows whose score stands out from the others', the most suspicious first.

    That is what `metrics.outliers` finds: by `on` only rows below 0, which hurt.
    """
    order, sign = suspicious(rows, by), -1 if by == "on" else 1
    marked = outliers([sign * float(rows[i].score(by) or 0.0) for i in order])
    return [i for i, out in zip(order, marked, strict=True) if out]


def flagged(rows: Sequence[InfluenceRecord], by: str, keep: float) -> list[int]:
    """Return the numbers of the most suspicious rows, so many that the share `keep` is left (at least one row)."""
    return suspicious(rows, by)[: len(rows) - max(1, round(keep * len(rows)))]


def check_by(by: str, with_on: bool) -> None:
    """Raise IVONError if rows cannot be ranked by this score: `on` needs other data."""
    if by == "on" and not with_on:
        raise IVONError(f"{param_ref('by')} on: it is the effect on other data; name them with {param_ref('on')}")


def check_keep(keep: float) -> None:
    """Raise IVONError unless `keep` is a share of the rows."""
    if not 0 < keep < 1:
        raise IVONError(f"{param_ref('keep')} {keep:g} is outside (0, 1); 0.9 leaves the most suspicious tenth out")


def check_same(rows: Sequence[InfluenceRecord], scores: str | Path, data: str | Path) -> None:
    """Raise IVONError unless `rows`, read from the file `scores`, are of these data."""
    examples = read_examples(data)
    differs = f"{len(rows)} rows, not {len(examples)}" if len(rows) != len(examples) else ""
    for row, example in zip(rows, examples, strict=False):
        texts = {"question": example.question, "answer": example.answer}
        other = next((name for name, text in texts.items() if getattr(row, name) not in (None, text)), None)
        if other and not differs:
            differs = f"row {row.index} has another {other}"
    if differs:
        raise IVONError(
            f"{param_ref('scores')} {scores}: {differs}, so they are of other data than {param_ref('data')} {data}; "
            f"compute them anew, without {param_ref('scores')}"
        )


def save_without(path: Path, data: str | Path, lines: Collection[int]) -> None:
    """Write the file `data` without these lines (numbers from 1), the others byte for byte, whole or not at all.

    Raises:
        IVONError: the file cannot be written.
    """
    with (
        open(data, encoding="utf-8", newline="") as source,
        new_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        file.writelines(line for number, line in enumerate(source, start=1) if number not in lines)
