"""recommended.json, which training, `ivon-post sweep` and `ivon-post mbr --risk` write and most commands take."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from ..metrics.verdict import IN_WORDS, Paired, figures
from ..storage.format import RECOMMENDED_FILE as RECOMMENDED_FILE
from ..storage.format import file_names
from .base import Record, Share, Tau
from .evaluation import Difference, Metrics


def describe(tau: float, ratio: float = 0.0, temperature: float = 1.0) -> str:
    """Return what is predicted with, in words: "the mean with T 1.3", "draws at τ 4 with pruning ratio 0.1"."""
    additions = [] if temperature == 1 else [f"T {temperature:.3g}"]
    additions += [f"pruning ratio {ratio:g}"] if ratio else []
    name = "the mean" if math.isinf(tau) else f"draws at τ {tau:g}"
    return f"{name} with {' and '.join(additions)}" if additions else name


class CertifiedOn(Record):
    """The examples that a threshold was tested on."""

    examples: int
    answered: int
    errors: int
    bound: float | None = None  # of the share of errors, with the confidence that was asked for


class Sizes(Record):
    """How many examples chose, and how many reported."""

    chosen_on: int
    reported_on: int


class Reported(Metrics):
    """Metrics with their standard errors."""

    se: Metrics = Metrics()


class GridPoint(Record):
    """One τ, one pruning ratio and one softmax temperature, with metrics on the examples that choose and report."""

    tau: Tau
    ratio: Share
    chosen_on: Metrics
    reported_on: Metrics
    front: bool = False
    temperature: float = 1.0

    def describe(self) -> str:
        """Return the point in words."""
        return describe(self.tau, self.ratio, self.temperature)


class SweepVerdict(Record):
    """Whether the best point is better than the mean, on the examples that report."""

    differences: dict[str, Difference] = {}  # best − mean by metric, paired; empty if the mean is the best
    outcome: str  # in the words of `metrics.verdict.judge`, or "the mean" where that was the best
    edges: list[str] = []  # coordinates of the best point at the edge of the grid, where better ones may lie beyond
    examples_needed: int | None = None  # in all, to show the difference; None unless it is within noise
    text: str  # all of it in a line


class DrawsPoint(Record):
    """The best τ and T of draws, used when draws are asked for although the mean is recommended."""

    tau: Tau
    temperature: float = 1.0


class PredictionSet(Record):
    """The least probability with which a label enters the set.

    The set holds the right label with probability `coverage`.
    """

    coverage: float
    threshold: Share
    examples: int  # that it was found on
    covered: float | None = None  # on the examples that report, the share of sets with the right label
    size: float | None = None  # and the labels of a set on average


class Recommendation(Record):
    """How to predict with an adapter: τ and pruning ratio, and from which confidence on to answer.

    Fields that only `ivon-post sweep` fills keep their defaults in a file of training or of `ivon-post mbr`.
    """

    written_by: ClassVar[str] = "ivon-post sweep"

    tau: Tau
    ratio: Share
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of the softmax
    objective: str | None = None
    score: str = "probability"  # what the threshold is of: "probability" of the answer, or "agreement" of outputs
    threshold: Share | None = None
    risk: float | None = None
    confidence: float | None = None
    coverage: float | None = None
    certified_on: CertifiedOn | None = None
    prediction_set: PredictionSet | None = None
    adapter: str | None = None
    mean_sha256: str | None = None
    sigma_sha256: str | None = None  # of its σ before tempering and pruning, where that was drawn from or pruned by
    base_model: str | None = None
    data: list[str] = []
    task: str | None = None
    choices: list[str] = []
    by_length: bool = False  # choices are scored by the mean log-probability of their tokens, not the sum
    samples: int | None = None
    seed: int | None = None
    adapter_tau: Tau = 1.0  # of the adapter that was swept; `tau` comes on top of it
    examples: Sizes | None = None
    chosen_on: Metrics | None = None
    reported_on: Reported | None = None
    mean_reported_on: Metrics | None = None
    mean_confidence: Share | None = None  # on the examples that report, at what is recommended
    verdict: SweepVerdict | None = None
    best: GridPoint | None = None
    grid: list[GridPoint] = []
    scaled: list[GridPoint] = []
    draws: DrawsPoint | None = None

    @property
    def needs_sigma(self) -> bool:
        """Whether it says more than what to predict with at the unpruned mean."""
        return math.isfinite(self.tau) or self.ratio > 0 or self.draws is not None

    def describe(self) -> str:
        """Return what is recommended, and its metrics on examples that had no part in the choice, in words."""
        reported, text = self.reported_on or Reported(), describe(self.tau, self.ratio, self.temperature)
        # How often a token is right, most of which follow from those before, says nothing about an answer.
        shown, unit = (["nll"], " per token") if self.task == "generate" else (list(IN_WORDS), "")
        known = {metric: value for metric in shown if (value := reported.value(metric)) is not None}
        values = {metric: Paired(value, reported.se.value(metric)) for metric, value in known.items()}
        return f"{text}; on examples that had no part in the choice: {figures(values, '')}{unit}" if values else text

    def sentences(self) -> list[str]:
        """Return what is recommended, why, and what the threshold for an answer's probability promises."""
        where = ", ".join(file_names(self.data).values()) or "validation data"
        by = f"by {self.objective} " if self.objective else ""
        sentences = [f"Recommended, {by}on {where}: {self.describe()}."]
        sentences += [f"Why: {self.verdict.text}."] if self.verdict and self.verdict.text else []
        if self.threshold is not None and self.score == "probability":
            risk, confidence, coverage = (100 * (each or 0) for each in (self.risk, self.confidence, self.coverage))
            sentences.append(
                f"Promise: answer where the confidence is at least {self.threshold:.3f}, and hand over otherwise; then "
                f"at most {risk:.1f} % of the answers are wrong, with {confidence:.0f} % confidence, for data like "
                f"that; {coverage:.1f} % of it is answered."
            )
        return sentences
