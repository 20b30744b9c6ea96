"""A line of `ivon-post influence --output`: what one row of the training data did to the mean."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..errors import IVONError
from .base import Record

SCORES = ("loss", "leverage", "sensitivity", "on")


class InfluenceRecord(Record):
    """The scores of one row. They are all None for a row whose answer does not fit the model.

    Attributes:
        index: the place of the row, from 0.
        loss: mean over the tokens of the answer, at the mean, in nats.
        leverage: the variance under σ of the log-odds of the answer.
        sensitivity: by how much the loss would rise if the row were left out.
        on: the same for the loss on other data, below 0 where the row hurts; None without such data.
        line: its line in the file, from 1.
    """

    written_by: ClassVar[str] = "ivon-post influence"

    index: int
    loss: float | None
    leverage: float | None
    sensitivity: float | None
    on: float | None
    line: int | None = None
    question: str | None = None
    answer: str | None = None

    def score(self, name: str) -> float | None:
        """Return the score of this name, one of `SCORES`."""
        value: float | None = getattr(self, name)
        return value


def load(path: str | Path, name: str) -> list[InfluenceRecord]:
    """Read all rows of a file, in order; `name` is the parameter that gave the path.

    Raises:
        IVONError: the file cannot be read, or is no such file.
    """
    rows: list[InfluenceRecord] = []
    for source, row in InfluenceRecord.load_lines(path, name):
        if row.index != len(rows):
            raise IVONError(f"{source}: index is {row.index}, not {len(rows)}; write the file anew")
        rows.append(row if row.line else row.model_copy(update={"line": len(rows) + 1}))
    return rows
