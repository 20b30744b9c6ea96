"""What `ivon-post eval` writes: the document of --json, and a line for each example of --output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from ..errors import IVONError, param_ref
from .base import Record, Tau


class Metrics(Record):
    """The metrics of `metrics.scores.metrics`, or their standard errors; None where one has no value."""

    accuracy: float | None = None
    ece: float | None = None
    ece15: float | None = None
    nll: float | None = None
    perplexity: float | None = None
    brier: float | None = None
    aece: float | None = None
    auroc: float | None = None
    aurc: float | None = None
    augrc: float | None = None
    cov_at_5risk: float | None = None
    risk_at_80cov: float | None = None
    entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None

    def value(self, metric: str) -> float | None:
        """Return the metric of this name."""
        return getattr(self, metric, None)  # type: ignore[no-any-return]


class Difference(Record):
    """A paired difference of one metric between two variants."""

    difference: float | None = None
    standard_error: float | None = None


class _Predictions(Record):
    """Which predictions a row is about."""

    name: str  # of the variant
    data: str  # the file
    examples: int
    predictions: int | None = None  # one for an example, or for a token
    samples: int | None = None  # draws that were averaged
    temperature: float = 1.0  # of the softmax
    coverage: float | None = None  # the share of the examples that these are, where the others were not answered
    threshold: float | None = None  # the confidence from which on they were answered
    error_bound: float | None = None  # with 95 % confidence, at most this share of such answers is wrong


class VariantResult(Metrics, _Predictions):
    """The metrics of one variant on one file."""

    se: Metrics = Metrics()
    versus_mean: dict[str, Difference] | None = None
    versus_base: dict[str, Difference] | None = None
    versus_mean_temperature: dict[str, Difference] | None = Field(None, alias="versus_mean+temperature")

    def versus(self, reference: str) -> dict[str, Difference]:
        """Return the differences to another variant ("mean", "base", "mean+temperature") by metric."""
        return getattr(self, f"versus_{reference.replace('+', '_')}") or {}


class OodErrors(Record):
    """Standard errors of the figures of an `OodResult`."""

    auroc: float | None = None
    aupr: float | None = None
    fpr95: float | None = None


class OodResult(Record):
    """How well a score of one variant tells the examples of one file from those of the data."""

    name: str  # of the variant
    data: str  # the file out of the distribution
    score: str  # a key of `evaluation.ood.SCORES`
    auroc: float | None = None
    aupr: float | None = None
    fpr95: float | None = None
    se: OodErrors = OodErrors()


class VerdictResult(Record):
    """What a difference in one metric means."""

    data: str
    name: str
    than: str  # the variant that it is compared with
    metric: str
    difference: float | None = None
    standard_error: float | None = None
    verdict: str  # "better", "worse", "within noise", "the same" or "too few examples"
    examples_needed: int | None = None
    text: str


class Calibration(Record):
    """The softmax temperatures that were fitted on a file, by variant."""

    data: str
    examples: int
    temperatures: dict[str, float]


class EvaluationRecord(Record):
    """What `ivon-post eval --json` prints."""

    written_by: ClassVar[str] = "ivon-post eval --json"

    rows: list[VariantResult] = Field(min_length=1)
    ood: list[OodResult] = []
    verdicts: list[VerdictResult] = []
    task: str = "choice"
    choices: list[str] = []
    by_length: bool = False  # choices are scored by the mean log-probability of their tokens, not the sum
    adapter: str | None = None
    mean_sha256: str | None = None
    sigma_sha256: str | None = None  # of its σ before tempering and pruning, where a row needs σ
    base_model: str | None = None
    samples: int | None = None
    tau: Tau = 1.0
    adapter_tau: Tau = 1.0  # of the adapter; `tau` comes on top of it
    prune_ratio: float = 0.0
    seed: int = 0
    calibration: Calibration | None = None
    output: str | None = None  # the file of examples

    @classmethod
    def load(cls, path: str | Path, name: str, header: Mapping[str, str] | None = None) -> Self:
        """Read an evaluation; with the header of an ivon_sigma.safetensors it must be of this adapter, and of this σ.

        Raises:
            IVONError: as for any record, or it is another adapter's.
        """
        record = super().load(path, name)
        if header is None:
            return record
        named, anew = f"{param_ref(name)} {path}", f"write it anew with `{cls.written_by}`"
        if record.mean_sha256 is None:
            raise IVONError(f"{named} does not say of which adapter it is (mean_sha256); {anew}")
        if record.mean_sha256 != header.get("mean_sha256"):
            raise IVONError(f"{named} is of another adapter, {record.adapter} (mean_sha256 differs); {anew}")
        if record.sigma_sha256 is None:
            return record
        if record.sigma_sha256 != header.get("sigma_sha256"):
            raise IVONError(f"{named} is of another σ around this mean (sigma_sha256 differs); {anew}")
        if record.adapter_tau != float(tau := header.get("tau", "1")):
            raise IVONError(f"{named} is of this adapter at τ {record.adapter_tau:g}, and it is at {tau}; {anew}")
        return record

    @property
    def draws(self) -> str:
        """How many draws at which temperature, and the pruning ratio where a row has it, in words."""
        if self.rows and all(row.samples == 1 for row in self.rows):
            return "no draws"
        pruned = self.prune_ratio and any(
            row.name.startswith(("recommended", "mean-", "posterior-")) for row in self.rows
        )
        text = f"{self.samples} draws at τ {self.tau:g}"
        text += "" if self.adapter_tau == 1 else f" (times the adapter's own {self.adapter_tau:g})"
        return text + (f", pruning ratio {self.prune_ratio:g}" if pruned else "")

    @property
    def files(self) -> list[str]:
        """The data files, in the order of the rows."""
        return list(dict.fromkeys(row.data for row in self.rows))

    @property
    def ood_files(self) -> list[str]:
        """The files out of the distribution."""
        return list(dict.fromkeys(result.data for result in self.ood))


class Prediction(Record):
    """One variant's prediction of one example; with the task "generate", means over its tokens.

    `right` is there with choices or labels, as `probabilities` and `prediction` are; `tokens` and `accuracy` for
    generated text. The mutual information, in nats, is None where draws do not tell it.
    """

    probabilities: dict[str, float] | None = None
    prediction: str | None = None
    right: bool | None = None
    tokens: int | None = None
    accuracy: float | None = None
    confidence: float
    nll: float | None = None
    entropy: float | None = None
    mutual_information: float | None = None
    abstain: bool | None = None  # of a variant with a threshold: whether the confidence is below it

    @model_validator(mode="after")
    def _is_scored(self) -> Self:
        if self.right is None and self.accuracy is None:
            raise ValueError("it must have `right` or `accuracy`")
        return self

    @property
    def correct(self) -> float:
        """1 or 0, or for generated text the share of tokens that are right."""
        return float(self.right) if self.right is not None else self.accuracy or 0.0


class ExampleRecord(Record):
    """A line of `ivon-post eval --output`: an example, and what every variant predicts."""

    written_by: ClassVar[str] = "ivon-post eval --output"

    data: str
    line: int | None = None  # in that file, from 1
    question: str | None = None  # the last turn of the user
    answer: str | None = None
    rows: dict[str, Prediction]  # by the name of the variant
