"""Selective prediction: how well a confidence tells what to answer from what to hand over.

Predictions are answered by falling confidence. Their *coverage* is the share that is answered, their *risk* the mean
loss among those: with losses of 0 and 1, the error rate. The definitions are those of torch-uncertainty (AURC, AUGRC,
CovAt5Risk, RiskAt80Cov, AdaptiveCalibrationError) and lm-polygraph (PRR), which leave the order of equal confidences to
their sort; here it is random, and every total is its expectation.

`weights` say how often each prediction counts, for a thousand resamples of a bootstrap at once.
"""

from __future__ import annotations

import numpy as np


class RiskCoverage:
    """The losses of predictions, added up by falling confidence.

    Args:
        confidence: shape (n,).
        loss: of each prediction, shape (n,).
        weights: how often each counts, whole numbers of shape (…, n); once by default.

    All methods but `curve` and `loss` return float64 of shape (…,), NaN where there is no value.
    """

    def __init__(self, confidence: np.ndarray, loss: np.ndarray, weights: np.ndarray | None = None) -> None:
        weights = np.ones(len(confidence)) if weights is None else weights
        order = np.argsort(-confidence, kind="stable")
        ends = np.flatnonzero(np.diff(confidence[order], append=np.nan))  # the last of each height
        weights = weights[..., order]
        # After each height, shape (…, heights): predictions so far, and their loss.
        self._count = weights.cumsum(-1)[..., ends]
        self._loss = (weights * np.asarray(loss, float)[order]).cumsum(-1)[..., ends]
        self.total = self._count[..., -1]

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return coverage and risk if all predictions down to each height of the confidence are answered."""
        return self._count / self.total[..., None], self._loss / self._count

    def loss(self, answered: np.ndarray) -> np.ndarray:
        """Return the loss of the first `answered` predictions, (k,) or (…, k), as (…, k): linear in ties."""
        shape = (*self.total.shape, answered.shape[-1])
        heights = self._count.shape[-1]
        count, losses = (np.pad(a.reshape(-1, heights), ((0, 0), (1, 0))) for a in (self._count, self._loss))
        wanted = np.broadcast_to(answered, shape).reshape(len(count), -1)
        # One search for all rows: each lifted above the one before.
        lift = (np.arange(len(count)) * (self.total.max() + 1))[:, None]
        row = np.arange(len(count))[:, None] * (heights + 1)
        after = np.searchsorted((count + lift).ravel(), (wanted + lift).ravel()).reshape(wanted.shape)
        before = np.maximum(after - 1, row)
        count, losses = count.ravel(), losses.ravel()
        size = np.maximum(count[after] - count[before], 1)
        return (losses[before] + (wanted - count[before]) * (losses[after] - losses[before]) / size).reshape(shape)

    def area(self) -> np.ndarray:
        """Return Σ_k r(k), over every k from one prediction to all: r(k) is the risk when k are answered."""
        count, risk = self._steps()
        # Within a height r(k) = s + (L − c·s)/k, s being its risk, L and c loss and count before it.
        harmonic = np.concatenate([[0], (1 / np.arange(1, int(self.total.max()) + 1)).cumsum()])
        places = harmonic[self._count.astype(np.int64)]
        spread = np.diff(places, prepend=0, axis=-1)
        before = self._shifted(self._loss) - self._shifted(self._count) * risk
        return (count * risk + before * spread).sum(-1)

    def aurc(self) -> np.ndarray:
        """Return the area under the risk-coverage curve (Geifman and El-Yaniv 2017, arXiv 1705.08500): lower is better.

        By the trapezoidal rule from one prediction to all, over the length of that range; NaN below two predictions.
        """
        ends = self.loss(np.ones(1))[..., 0] + self._loss[..., -1] / self.total
        return self._over_range(self.area() - ends / 2)

    def augrc(self) -> np.ndarray:
        """Return the area under the generalized risk-coverage curve (Traub et al. 2024, arXiv 2407.01032).

        Lower is better. Its risk is the loss of what is answered per prediction, answered or not: coverage times risk.
        """
        count, risk = self._steps()
        area = (count * self._shifted(self._loss) + risk * count * (count + 1) / 2).sum(-1)
        ends = self.loss(np.ones(1))[..., 0] + self._loss[..., -1]
        return self._over_range((area - ends / 2) / self.total)

    def coverage_at(self, risk: float) -> np.ndarray:
        """Return the largest coverage at which the risk is at most `risk`; NaN if it is larger at every one."""
        count, own = self._steps()
        before = self._shifted(self._count)
        whole = self._loss <= risk * self._count * (1 + 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.floor((risk * before - self._shifted(self._loss)) / (own - risk) + 1e-9)
        part = np.where((own > risk) & (part >= 1), np.minimum(part, count), -before)
        answered = np.where(count > 0, np.where(whole, self._count, before + part), 0).max(-1)
        return np.where(answered > 0, answered, np.nan) / self.total

    def risk_at(self, coverage: float) -> np.ndarray:
        """Return the risk of the most confident share `coverage`, rounded up to whole predictions."""
        answered = np.ceil(self.total * coverage)
        return self.loss(answered[..., None])[..., 0] / answered

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the count and the risk of each height alone, shape (…, heights)."""
        count = np.diff(self._count, prepend=0, axis=-1)
        return count, np.diff(self._loss, prepend=0, axis=-1) / np.maximum(count, 1)

    @staticmethod
    def _shifted(sums: np.ndarray) -> np.ndarray:
        """Return each sum as it was before its height."""
        return np.concatenate([np.zeros_like(sums[..., :1]), sums[..., :-1]], -1)

    def _over_range(self, area: np.ndarray) -> np.ndarray:
        return area / np.where(self.total > 1, self.total - 1, np.nan)


def upper_bound(errors: int, answered: int, confidence: float) -> float:
    """Return the upper confidence bound of Clopper and Pearson on an error rate, one-sided; 1 without answers."""
    from scipy.special import bdtri

    return 1.0 if errors >= answered else float(bdtri(errors, answered, 1 - confidence))


def prr(confidence: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Return the prediction rejection ratio (Malinin and Gales 2021, arXiv 2002.07650; lm-polygraph).

    How much of the gain in mean quality, when the least confident are rejected one by one, is realized: 1 if the
    confidence orders like the quality, 0 if like chance, below if worse.

    Args:
        confidence: of each output, shape (n,).
        quality: any measure of it, higher is better, shape (n,).

    Returns:
        float64 of shape (); NaN where all qualities are equal.
    """
    quality = np.asarray(quality, float)
    curve = RiskCoverage(confidence, quality)
    best = RiskCoverage(quality, quality).area()
    chance = curve.loss(curve.total[..., None])[..., 0]  # the mean, at each of `total` places
    gain = np.where(np.isclose(best, chance), np.nan, best - chance)
    return (curve.area() - chance) / gain


def adaptive_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the calibration error over ten bins with equally many predictions (Nixon et al. 2019, arXiv 1904.01685).

    Bins are filled by rising confidence; the first take what cannot be shared equally, and what stays empty (fewer
    predictions than bins) counts for nothing.

    Returns:
        float64 of shape (…,), `weights` being of shape (…, n).
    """
    curve = RiskCoverage(confidence, np.asarray(correct, float) - confidence, weights)
    size, larger = np.divmod(curve.total[..., None], 10)
    place = np.arange(11)
    below = place * size + np.minimum(place, larger)
    gaps = np.diff(curve.loss(curve.total[..., None] - below), axis=-1)
    return np.abs(gaps).sum(-1) / curve.total


def is_below(confidence: float, threshold: float) -> bool:
    """Say whether to abstain. Equal shares may differ in their last bits, and so do probabilities by the batch."""
    return confidence < threshold - 1e-6
