"""What is made of an averaged prediction. Imports no pydantic, which takes longer than tempering an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..records.recommendation import PredictionSet


@dataclass(frozen=True)
class DecisionRule:
    """What is made of an averaged prediction.

    Attributes:
        temperature: its log-probabilities are divided by this.
        threshold: answer where the confidence is at least this; None: always.
        score: what that confidence is: "probability" of the answer, or "agreement" of the outputs of `mbr`.
        mean_confidence: on validation data; None where nobody has measured it.
        by_length: choices are scored by the mean log-probability of their tokens.
        prediction_set: from which probability on a label is in the set that holds the right one; None: there are none.
    """

    temperature: float = 1.0
    threshold: float | None = None
    score: str = "probability"
    prediction_set: PredictionSet | None = None
    by_length: bool = False
    mean_confidence: float | None = None
