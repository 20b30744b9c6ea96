"""What a report is about: the documents that `eval`, `sweep` and `influence` have written of one adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import IVONError, param_ref
from ..posterior.recommended import recommended_from
from ..records import influence as influence_file
from ..records.evaluation import EvaluationRecord, ExampleRecord
from ..records.influence import InfluenceRecord
from ..records.recommendation import Recommendation

NOTHING = EvaluationRecord.model_construct(rows=[])  # no evaluation


@dataclass(frozen=True)
class Findings:
    """Everything that was measured of an adapter; what was not is None or empty."""

    evaluation: EvaluationRecord = NOTHING
    examples: Sequence[ExampleRecord] = ()
    sweep: Recommendation | None = None
    influence: Sequence[InfluenceRecord] = ()

    @classmethod
    def read(
        cls,
        header: Mapping[str, str],
        evaluation: Path | None = None,
        examples: Path | None = None,
        sweep: Path | None = None,
        influence: Path | None = None,
    ) -> Findings:
        """Read the files about the adapter whose ivon_sigma.safetensors has `header`.

        `examples` is by default the file that `evaluation` names, where it is still there or lies beside it.

        Raises:
            IVONError: a file cannot be read, is no such document, or is another adapter's or another evaluation's.
        """
        if examples is not None and evaluation is None:
            raise IVONError(f"{param_ref('examples')} {examples}: give the {param_ref('eval')} that belongs to it too")
        record = NOTHING
        if evaluation is not None:
            record = EvaluationRecord.load(evaluation, "eval", header)
            if examples is None and record.output is not None:
                named = Path(record.output)
                examples = next((path for path in (named, evaluation.parent / named.name) if path.is_file()), None)
        return cls(
            record,
            _read_examples(examples, record) if examples is not None else (),
            recommended_from(sweep, header, "sweep") if sweep is not None else None,
            influence_file.load(influence, "influence", header) if influence is not None else (),
        )

    def values(self, data: str, variant: str, figure: str) -> np.ndarray:
        """Return one figure of a variant for every example of a file, (n,) float64; NaN where there is none.

        `figure` is a field of `Prediction`, or "correct": 1 or 0, or for generated text the share of right tokens.
        """
        predictions = [line.rows[variant] for line in self.examples if line.data == data and variant in line.rows]
        values = (getattr(prediction, figure) for prediction in predictions)
        return np.array([math.nan if value is None else float(value) for value in values])

    @property
    def threshold(self) -> float | None:
        """The confidence from which on to answer, where the sweep promised one for the probability of an answer."""
        return self.sweep.threshold if self.sweep and self.sweep.score == "probability" else None


def _read_examples(path: Path, evaluation: EvaluationRecord) -> list[ExampleRecord]:
    """Read the examples of an evaluation, and check that they are of this one."""
    findings = Findings(evaluation, [line for _, line in ExampleRecord.load_lines(path, "examples")])
    variants = {name for line in findings.examples for name in line.rows}
    for row in evaluation.rows:
        if row.coverage is not None and row.name not in variants:  # a part of another row's
            continue
        correct = findings.values(row.data, row.name, "correct")
        one_each = row.predictions in (None, row.examples)
        differs = one_each and row.accuracy is not None and abs(correct.mean() - row.accuracy) > 1e-6
        if len(correct) != row.examples or differs:
            raise IVONError(
                f"{param_ref('examples')} {path} is of another evaluation: it does not agree with {row.name} on "
                f"{row.data}; evaluate once with both {param_ref('output')} and JSON"
            )
    return list(findings.examples)
