"""How well the uncertainty of each variant tells other data from the usual (arXiv 1610.02136).

An example of many tokens has the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.auroc import detection
from ..records.evaluation import OodErrors, OodResult

if TYPE_CHECKING:
    from ..metrics.scores import Scores
    from .evaluate import Evaluation
    from .variants import Variant

# Each score of a prediction, high where it looks foreign; the last two need several draws.
SCORES: dict[str, Callable[[Scores], Any]] = {
    "max_probability": lambda scores: -scores.confidence,
    "entropy": lambda scores: scores.entropy,
    "mutual_information": lambda scores: scores.entropy - scores.expected_entropy,
    "variance": lambda scores: scores.variance,
}
_OF_ONE_PASS = ("max_probability", "entropy")
_RESAMPLES = 200  # a standard error is then known to 5 %


def detect(
    evaluation: Evaluation, variants: Sequence[Variant], scores: Sequence[Scores], samples: int
) -> list[OodResult]:
    """Return how well each score tells the examples of each file in `ood_files` from all those of `files`.

    Standard errors are by the bootstrap. Variants of one pass, or at a fitted temperature, have no disagreement.
    """
    results = []
    usual = sum(map(len, evaluation.files.values()))
    for path, numbers in evaluation.ood_files.items():
        positive = np.repeat([0.0, 1.0], [usual, len(numbers)])
        generator = np.random.default_rng(0)
        # How often every example is drawn, shape (resamples, examples).
        resamples = [generator.multinomial(n, np.full(n, 1 / n), _RESAMPLES) for n in (usual, len(numbers))]
        weights = np.concatenate(resamples, axis=1).astype(float)
        for variant, score in zip(variants, scores, strict=True):
            for name, of in SCORES.items():
                if name not in _OF_ONE_PASS and (variant.passes(samples) == 1 or variant.temperature != 1):
                    continue
                values = score.mean_of_groups(of(score)).numpy()
                values = np.concatenate([values[:usual], values[numbers.start : numbers.stop]])
                figures = {key: float(value) for key, value in detection(values, positive).items()}
                errors = {key: float(drawn.std(ddof=1)) for key, drawn in detection(values, positive, weights).items()}
                results.append(OodResult(name=variant.name, data=path, score=name, **figures, se=OodErrors(**errors)))
    return results
