"""What `ivon-post predict` writes: a line for each text."""

from __future__ import annotations

from typing import ClassVar

from .base import Record, Share


class Decision(Record):
    """What a posterior decides about one text: the label, and how sure it is.

    The probabilities are averaged over draws, at the softmax temperature of a recommendation. Both entropies are in
    nats, and of the draws as they are: their sum is the entropy of the average.
    """

    written_by: ClassVar[str] = "ivon-post predict"

    line: int | None = None  # in the input, from 1
    text: str | None = None  # the last turn before the answer
    label: str  # the most probable one
    confidence: Share  # its probability
    abstain: bool | None = None  # whether that is below the threshold, where there is one
    set: list[str] | None = None  # labels of which one is right as often as `sweep --coverage` promises, if it was run
    expected_entropy: float  # within draws: the text itself leaves the label open
    mutual_information: float  # between draws: they expect different labels
    probabilities: dict[str, float]  # of every label
