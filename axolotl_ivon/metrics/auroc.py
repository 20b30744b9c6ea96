"""The area under the ROC curve, which says how well a score tells two classes apart."""

from __future__ import annotations

import numpy as np


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the probability that a positive scores higher than a negative, a tie counting half (Mann and Whitney).

    Args:
        score: shape (n,).
        positive: 1 or 0 for each score, shape (n,).
        weights: how often each counts, shape (…, n); once by default.

    Returns:
        float64 of shape (…,); NaN where either class is missing.
    """
    weights = np.ones(len(score)) if weights is None else weights
    _, rank = np.unique(score, return_inverse=True)
    order = np.argsort(rank, kind="stable")
    levels = np.flatnonzero(np.diff(rank[order], prepend=-1))  # where the scores of each height begin
    labels = (positive, 1 - np.asarray(positive, float))
    hits, misses = (np.add.reduceat((weights * label)[..., order], levels, axis=-1) for label in labels)
    below = misses.cumsum(-1) - misses / 2
    with np.errstate(invalid="ignore"):
        return (hits * below).sum(-1) / (hits.sum(-1) * misses.sum(-1))
