"""How well a score tells positives from negatives, weighted.

Everything takes `score` of shape (n,), `positive`, 1 or 0 for each, of shape (n,), and `weights`, how often each
counts, of shape (…, n), by default once. It returns float64 of shape (…,).
"""

from __future__ import annotations

import numpy as np


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the probability that a positive scores higher than a negative, a tie counting half (Mann and Whitney).

    It is the area under the ROC curve; NaN where either class is missing.
    """
    hits, misses = _by_height(score, positive, weights)
    with np.errstate(invalid="ignore"):
        return (misses * (hits.cumsum(-1) - hits / 2)).sum(-1) / (hits.sum(-1) * misses.sum(-1))


def detection(score: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return `auroc`, `aupr` and `fpr95` of a score (Hendrycks and Gimpel 2017, arXiv 1610.02136); both classes exist.

    aupr is the average precision, Σ_k (recall_k − recall_(k−1))·precision_k over falling thresholds; fpr95 the share of
    negatives at or above the highest threshold that 95 % of the positives reach. Both take equal scores together.
    """
    hits, misses = (counts.cumsum(-1) for counts in _by_height(score, positive, weights))
    recall = hits / hits[..., -1:]
    precision = hits / np.maximum(hits + misses, 1e-300)
    first = (recall >= 0.95).argmax(-1)[..., None]
    return {
        "auroc": auroc(score, positive, weights),
        "aupr": (np.diff(recall, prepend=0, axis=-1) * precision).sum(-1),
        "fpr95": np.take_along_axis(misses, first, -1)[..., 0] / misses[..., -1],
    }


def _by_height(score: np.ndarray, positive: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return how many positives and negatives have each score, the highest first, shape (…, heights)."""
    _, rank = np.unique(-score, return_inverse=True)
    order = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.diff(rank[order], prepend=-1))
    weights = np.ones(len(score)) if weights is None else weights
    share = np.asarray(positive, float)
    hits, misses = (np.add.reduceat((weights * label)[..., order], starts, axis=-1) for label in (share, 1 - share))
    return hits, misses
