"""How well a score tells positives from negatives, weighted (Hendrycks and Gimpel 2017, arXiv 1610.02136)."""

from __future__ import annotations

import numpy as np

from .auroc import auroc


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
