"""What every row says of every example, to find those that the model is unsure of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..storage.atomic import new_file

if TYPE_CHECKING:
    from ..data.encode import EncodedExample
    from ..metrics.scores import Scores
    from .evaluate import Evaluation, Variant


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise IVONError if `save` would not write `path`: worth asking before the evaluation."""
    named = f"{param_ref('output')} {path}"
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "there is no such folder"
        raise IVONError(f"{named}: {what}; give a file in a folder that exists")
    if path.exists() and not overwrite:
        raise IVONError(f"{named} exists; choose another name, or overwrite it with {param_ref('overwrite')}")


def save(path: Path, evaluation: Evaluation, rows: Sequence[Variant], scores: Sequence[Scores]) -> None:
    """Write `describe`'s examples to a JSONL file, whole or not at all.

    Raises:
        IVONError: the file cannot be written.
    """
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in describe(evaluation, rows, scores):
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def describe(evaluation: Evaluation, rows: Sequence[Variant], scores: Sequence[Scores]) -> Iterator[dict[str, Any]]:
    """Yield for every example where it is (`data`, `line`), the last `question`, the right `answer`, and `rows`.

    `rows` holds by name what each row says. With choices or labels: `probabilities` by choice, the `prediction`,
    whether it is `right`, its `confidence`, `nll`, `entropy` and `mutual_information`. For the task "generate" the
    number of `tokens`, and means over them: `accuracy`, `confidence`, `nll`, `entropy` and `mutual_information`. The
    mutual information is how far the draws disagree, in nats; it is null where draws do not say it.
    """
    columns = {row.name: _columns(score) for row, score in zip(rows, scores, strict=True)}
    kept = {row.name: _probabilities(score) for row, score in zip(rows, scores, strict=True)}
    for path, numbers in [*evaluation.files.items(), *evaluation.ood_files.items()]:
        for number in numbers:
            example, item = evaluation.examples[number], evaluation.items[number]
            yield {
                "data": path,
                "line": int(example.source.rsplit(":", 1)[1]),
                "question": example.messages[-1]["content"],
                "answer": example.answer,
                "rows": {
                    name: _row(evaluation.choices, item, number, column, kept[name]) for name, column in columns.items()
                },
            }


def _row(
    choices: Sequence[str],
    item: EncodedExample,
    number: int,
    columns: dict[str, list[float]],
    kept: list[list[float]] | None,
) -> dict[str, Any]:
    values = {name: None if value != value else value for name, value in ((n, c[number]) for n, c in columns.items())}
    share = values.pop("correct")
    if kept is None or not choices:
        return {"tokens": len(item.targets), "accuracy": share, **values}
    probabilities = dict(zip(choices, kept[number], strict=True))
    best = max(probabilities, key=lambda choice: probabilities[choice])
    return {"probabilities": probabilities, "prediction": best, "right": bool(share), **values}


def _columns(scores: Scores) -> dict[str, list[float]]:
    """Return each figure by example: the mean over its predictions."""
    import torch

    count = torch.bincount(scores.group)
    figures = {
        "correct": scores.correct,
        "confidence": scores.confidence,
        "nll": scores.nll,
        "entropy": scores.entropy,
        "mutual_information": scores.entropy - scores.expected_entropy,
    }
    return {name: (torch.bincount(scores.group, weights=one) / count).tolist() for name, one in figures.items()}


def _probabilities(scores: Scores) -> list[list[float]] | None:
    if scores.probabilities is None:
        return None
    return scores.probabilities[scores.group.argsort()].tolist()
