"""What every variant predicts for every example, to find those that the model is unsure of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..records.evaluation import ExampleRecord, Prediction

if TYPE_CHECKING:
    from ..data.encode import EncodedExample
    from ..metrics.scores import Scores
    from .evaluate import Evaluation
    from .variants import Variant


def describe(evaluation: Evaluation, variants: Sequence[Variant], scores: Sequence[Scores]) -> Iterator[ExampleRecord]:
    """Yield for every example, of the data and then out of the distribution, what each variant predicts."""
    columns = {variant.name: _columns(score) for variant, score in zip(variants, scores, strict=True)}
    for path, numbers in [*evaluation.files.items(), *evaluation.ood_files.items()]:
        for number in numbers:
            example, item = evaluation.examples[number], evaluation.items[number]
            rows = {
                name: _prediction(evaluation.choices, item, {name: column[number] for name, column in of.items()})
                for name, of in columns.items()
            }
            yield ExampleRecord(
                data=path,
                line=example.line,
                question=example.messages[-1]["content"],
                answer=example.answer,
                rows=rows,
            )


def _prediction(choices: Sequence[str], item: EncodedExample, values: dict[str, Any]) -> Prediction:
    share, kept = values.pop("correct"), values.pop("probabilities", None)
    values = {name: None if value != value else value for name, value in values.items()}
    if kept is None or not choices:
        return Prediction(tokens=len(item.targets), accuracy=share, **values)
    probabilities = dict(zip(choices, kept, strict=True))
    best = max(probabilities, key=lambda choice: probabilities[choice])
    return Prediction(probabilities=probabilities, prediction=best, right=bool(share), **values)


def _columns(scores: Scores) -> dict[str, list[Any]]:
    """Return each figure by example, the mean over its predictions, and the probabilities where they are kept."""
    figures = {
        "correct": scores.correct,
        "confidence": scores.confidence,
        "nll": scores.nll,
        "entropy": scores.entropy,
        "mutual_information": scores.entropy - scores.expected_entropy,
    }
    columns: dict[str, list[Any]] = {name: scores.mean_of_groups(values).tolist() for name, values in figures.items()}
    if scores.probabilities is not None:
        columns["probabilities"] = scores.probabilities[scores.group.argsort()].tolist()
    return columns
