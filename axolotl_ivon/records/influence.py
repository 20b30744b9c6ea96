"""A line of `ivon-post influence --output`: what one row of the training data did to the mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ..errors import IVONError, param_ref
from .base import Record

SCORES = ("loss", "leverage", "sensitivity", "on")


class InfluenceRecord(Record):
    """The scores of one row. They are all None for a row whose answer does not fit the model."""

    written_by: ClassVar[str] = "ivon-post influence"

    index: int  # the place of the row, from 0
    loss: float | None  # mean over the tokens of the answer, at the mean, in nats
    leverage: float | None  # the variance under σ of the log-odds of the answer
    sensitivity: float | None  # by how much the loss would rise if the row were left out
    on: float | None  # the same for the loss on other data, below 0 where the row hurts; None without such data
    line: int | None = None  # its line in the file, from 1
    question: str | None = None
    answer: str | None = None
    mean_sha256: str | None = None  # of the adapter

    def score(self, name: str) -> float | None:
        """Return the score of this name, one of `SCORES`."""
        return getattr(self, name)  # type: ignore[no-any-return]


def load(path: str | Path, name: str, header: Mapping[str, str]) -> list[InfluenceRecord]:
    """Read all rows of a file, in order; `name` is the parameter that gave the path.

    Raises:
        IVONError: the file cannot be read, or its rows are of another adapter than the one whose
            ivon_sigma.safetensors has `header`.
    """
    rows: list[InfluenceRecord] = []
    for source, row in InfluenceRecord.load_lines(path, name):
        if row.index != len(rows):
            raise IVONError(f"{source}: index is {row.index}, not {len(rows)}; write the file anew")
        if row.mean_sha256 not in (None, header.get("mean_sha256")):
            raise IVONError(
                f"{param_ref(name)} {path} is of another adapter (mean_sha256 differs); write it anew with "
                f"`{InfluenceRecord.written_by}`"
            )
        rows.append(row if row.line else row.model_copy(update={"line": len(rows) + 1}))
    return rows
