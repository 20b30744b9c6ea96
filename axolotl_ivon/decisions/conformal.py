"""Prediction sets: labels that hold the right one with a chosen probability (split conformal prediction).

Of n examples that had no part in the choice, each right label has a probability p_i. With the k-th smallest of them as
the threshold, k = ⌊(n + 1)(1 − c)⌋, the set {y: p(y|x) ≥ threshold} of a new example holds its right label with
probability at least c, over the n examples and the new one (Sadinle et al. 2019, arXiv 1609.00451; Angelopoulos and
Bates 2021, arXiv 2107.07511, theorem 1), whatever the model: if the probabilities are poor, the sets are large. The
most probable label is always in the set, which only adds to that.

What is not promised: c for each class, or for one text, or for data of another kind. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import IVONError, param_ref
from ..records.recommendation import PredictionSet

_ROUNDING = 1e-9


def check_coverage(coverage: float) -> None:
    """Raise IVONError unless it lies in (0, 1)."""
    if not 0 < coverage < 1:
        raise IVONError(f"{param_ref('coverage')} {coverage:g} is outside (0, 1); 0.9 is 90 %")


def find_set(
    probabilities: np.ndarray, target: np.ndarray, others: np.ndarray, other_target: np.ndarray, *, coverage: float
) -> PredictionSet:
    """Return the threshold for a coverage, and what its sets are on other examples.

    Args:
        probabilities, target: of the n examples that it is found on, (n, labels), and the right label of each, (n,).
        others, other_target: the same of examples to report on.
        coverage: as `check_coverage` has it.
    """
    count = len(target)
    rank = math.floor((count + 1) * (1 - coverage) + _ROUNDING)
    right = np.sort(probabilities[np.arange(count), target])
    threshold = float(right[rank - 1]) if rank else 0.0
    held = _held(others, threshold)
    return PredictionSet(
        coverage=coverage,
        threshold=threshold,
        examples=count,
        covered=float(held[np.arange(len(other_target)), other_target].mean()),
        size=float(held.sum(1).mean()),
    )


def _held(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    return (probabilities >= threshold - _ROUNDING) | (probabilities == probabilities.max(1, keepdims=True))


def labels_in_set(probabilities: Mapping[str, float], threshold: float) -> list[str]:
    """Return the labels of a text's set, the most probable first."""
    held = _held(np.array([list(probabilities.values())]), threshold)[0]
    labels = [label for label, inside in zip(probabilities, held, strict=True) if inside]
    return sorted(labels, key=lambda label: -probabilities[label])


def describe(sets: PredictionSet, parts: int = 1) -> str:
    """Return it in a line of words; it was found on one of so many equal `parts` of all the examples."""
    share = f"{100 * sets.coverage:g} %"
    if not sets.threshold:
        fewest = math.ceil(sets.coverage / (1 - sets.coverage) - _ROUNDING)
        line = f"{sets.examples} examples are too few for sets of {share}: they hold every label"
        enough = f"{fewest} are enough" if parts == 1 else f"give {parts * fewest}, {fewest} of them for this test"
        return f"{line}; {enough}"
    return (
        f"sets that hold the right label of {share} of the texts: every label with a probability of at least "
        f"{sets.threshold:.4g}; on the other examples a set has {sets.size or 0:.2f} labels on average and holds the "
        f"right one in {100 * (sets.covered or 0):.1f} %"
    )
