"""Is this input like what the model knows? How well a prediction's uncertainty tells other data from the usual.

Each example gets a score that is high where it looks foreign; the foreign ones are the positives (Hendrycks and Gimpel
2017, arXiv 1610.02136). An example of many tokens has the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.auroc import auroc

if TYPE_CHECKING:
    from ..metrics.scores import Scores
    from .evaluate import Evaluation, Variant

# Score -> what it is of the scores of predictions; the last two need several draws.
SCORES: dict[str, Callable[[Scores], Any]] = {
    "max_probability": lambda scores: -scores.confidence,
    "entropy": lambda scores: scores.entropy,
    "mutual_information": lambda scores: scores.entropy - scores.expected_entropy,
    "variance": lambda scores: scores.variance,
}
_OF_ONE_PASS = ("max_probability", "entropy")
_RESAMPLES = 200  # a standard error is then known to 5 %


def detection(score: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return how well a score tells positives: `auroc`, `aupr` and `fpr95`.

    aupr is the average precision, Σ_k (recall_k − recall_(k−1))·precision_k over falling thresholds; fpr95 the share of
    negatives at or above the highest threshold that 95 % of the positives reach. Both take equal scores together.

    Args:
        score: shape (n,).
        positive: 1 or 0 for each score, shape (n,); there are both.
        weights: how often each counts, shape (…, n); once by default.

    Returns:
        float64 of shape (…,).
    """
    weights = np.ones(len(score)) if weights is None else weights
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=np.nan))
    hits, misses = (
        (weights * label)[..., order].cumsum(-1)[..., ends] for label in (positive, 1 - np.asarray(positive, float))
    )
    recall = hits / hits[..., -1:]
    precision = hits / np.maximum(hits + misses, 1e-300)
    first = (recall >= 0.95).argmax(-1)[..., None]
    return {
        "auroc": auroc(score, positive, weights),
        "aupr": (np.diff(recall, prepend=0, axis=-1) * precision).sum(-1),
        "fpr95": np.take_along_axis(misses, first, -1)[..., 0] / misses[..., -1],
    }


def detect(
    evaluation: Evaluation, rows: Sequence[Variant], scores: Sequence[Scores], samples: int
) -> list[dict[str, Any]]:
    """Return how well each row's scores tell the examples of each file in `ood_files` from all those of `files`.

    `name` is the row's, `data` the file, `score` one of `SCORES`, then `auroc`, `aupr`, `fpr95`, and `se`, their
    bootstrap standard errors. Rows of one pass, or at a fitted temperature, have no disagreement to score by.
    """
    found = []
    for path, numbers in evaluation.ood_files.items():
        usual = sum(len(where) for where in evaluation.files.values())
        positive = np.array([0.0] * usual + [1.0] * len(numbers))
        generator = np.random.default_rng(0)
        weights = np.concatenate(
            [
                generator.multinomial(count, np.full(count, 1 / count), _RESAMPLES).astype(float)
                for count in (usual, len(numbers))
            ],
            axis=1,
        )
        for row, score in zip(rows, scores, strict=True):
            for name, of in SCORES.items():
                if name not in _OF_ONE_PASS and (row.passes(samples) == 1 or row.temperature != 1):
                    continue
                each = _per_example(of(score).numpy(), score.group.numpy())
                each = np.concatenate([each[:usual], each[numbers.start : numbers.stop]])
                errors = detection(each, positive, weights)
                found.append(
                    {
                        "name": row.name,
                        "data": path,
                        "score": name,
                        **{key: float(value) for key, value in detection(each, positive).items()},
                        "se": {key: float(value.std(ddof=1)) for key, value in errors.items()},
                    }
                )
    return found


def _per_example(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the mean of each example's values, in the examples' order."""
    return np.bincount(group, weights=values) / np.bincount(group)
