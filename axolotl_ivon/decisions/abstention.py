"""Abstention with a promise: a confidence threshold above which at most a given share of the answers is wrong.

Find a threshold t such that risk(t) = P(wrong | confidence ≥ t) ≤ r, with probability 1 − δ over the examples used to
find it. This is learn-then-test (Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence testing:

    H_j: risk(t_j) > r, for t_1 > t_2 > …        tested from one t_j on towards looser ones, each at level δ
    p_j = P(Binomial(n_j, r) ≤ k_j)              k_j wrong of the n_j examples with confidence ≥ t_j

The first H_j that is not rejected ends the sequence; the last that was rejected is the threshold. Given n_j, which is
random, k_j is binomial with risk(t_j), so every p_j is valid, and p_j ≤ δ says the same as: the exact upper bound
of Clopper and Pearson on risk(t_j) is ≤ r (the bound of Bates et al. 2021, arXiv 2101.02703). No correction for the
number of thresholds is due, as long as neither they nor their order depend on the examples of the test. They come from
other examples, the guide, which may show their labels: the grid is quantiles of its confidences, and the sequence
begins where the guide expects a rejection most (split fixed-sequence testing in the paper).

What is not promised: anything about data of another kind, about one class or group of inputs, or about one answer.
Imports no torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import IVONError, param_ref
from ..metrics.selective import upper_bound

_GRID = 50  # thresholds
_POWER = 0.8  # of the test with the number of examples that is asked for


@functools.lru_cache(maxsize=1 << 16)
def allowed_errors(answered: int, risk: float, confidence: float) -> int:
    """Return how many of the answers may be wrong for the promise to be made; −1: not even none.

    The largest k that is rare enough if the risk is `risk`: P(Binomial(answered, risk) ≤ k) ≤ 1 − confidence.
    """
    from scipy.special import bdtr

    low, high = -1, answered
    while high - low > 1:
        middle = (low + high) // 2
        # Rounding must not make the level 1 − confidence stricter than it is: 1 − 0.9 is below 0.1.
        low, high = (middle, high) if bdtr(middle, answered, risk) <= 1 - confidence + 1e-12 else (low, middle)
    return low


def least_answers(risk: float, confidence: float) -> int:
    """Return how many answers the promise takes when none of them is wrong: (1 − risk)^n ≤ 1 − confidence."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-risk) - 1e-9)


@dataclass(frozen=True)
class Abstention:
    """A threshold on the confidence with its promise, or the lack of one.

    Attributes:
        risk: the share of wrong answers that is not to be exceeded.
        confidence: the probability of that, over the examples.
        threshold: answer where the confidence is at least this; None if nothing can be promised.
        examples, answered, errors: of the examples that the test was made on.
        needed: without a threshold, about how many such examples would give one; None if no number is known to.
    """

    risk: float
    confidence: float
    threshold: float | None
    examples: int
    answered: int = 0
    errors: int = 0
    needed: int | None = None

    @property
    def coverage(self) -> float:
        """The share of the examples that is answered."""
        return self.answered / self.examples

    def document(self) -> dict[str, Any]:
        """Return its fields in a `Recommendation`."""
        promised = self.threshold is not None
        return {
            "threshold": self.threshold,
            "risk": self.risk,
            "confidence": self.confidence,
            "coverage": self.coverage if promised else None,
            "certified_on": {
                "examples": self.examples,
                "answered": self.answered,
                "errors": self.errors,
                "bound": upper_bound(self.errors, self.answered, self.confidence) if promised else None,
            },
        }

    def describe(self, share: float = 1.0) -> str:
        """Return it in a line of words; `share` of all the examples was there for the test."""
        promise = f"at most {100 * self.risk:g} % wrong, with {100 * self.confidence:g} % confidence"
        if self.threshold is not None:
            return (
                f"answer from confidence {self.threshold:.4g} on: {promise}; it answers {100 * self.coverage:.1f} % "
                f"({self.answered} of {self.examples}, {self.errors} wrong)"
            )
        line = f"no threshold can promise {promise}, from {self.examples} examples"
        if self.needed is None:
            return f"{line}; even the surest answers are wrong too often: allow more"
        return f"{line}: about {math.ceil(self.needed / share)} would, {self.needed} of them for this test"


def check_risk(risk: float, confidence: float) -> None:
    """Raise IVONError unless both lie in (0, 1)."""
    for name, value, example in (("risk", risk, 0.05), ("confidence", confidence, 0.9)):
        if not 0 < value < 1:
            raise IVONError(f"{param_ref(name)} {value:g} is outside (0, 1); {example} is {100 * example:g} %")


def find_threshold(
    scores: np.ndarray,
    correct: np.ndarray,
    guide_scores: np.ndarray,
    guide_correct: np.ndarray,
    *,
    risk: float,
    confidence: float = 0.9,
) -> Abstention:
    """Return the loosest threshold that the sequence of tests reaches (see the module).

    Args:
        scores, correct: confidence, and 1 (right) or 0 (wrong), of the independent examples of the test, shape (n,).
        guide_scores, guide_correct: the same of other examples, from which the thresholds and their order come.
        risk, confidence: as `check_risk` has them.
    """
    from scipy.special import bdtr

    # Values that are there: confidences may be few and tied. The last threshold answers everything.
    quantiles = np.quantile(guide_scores, np.linspace(0, 1, _GRID + 1), method="lower")
    grid = np.append(np.unique(quantiles)[::-1], 0.0)

    counts = np.array(_counts(guide_scores, guide_correct, grid))
    answers = np.rint(len(scores) / len(guide_scores) * counts[:, 0]).astype(int)
    allowed = np.array([allowed_errors(int(n), risk, confidence) for n in answers])
    # The probability of a rejection, were the guide's error rates true.
    expected = np.where(
        allowed < 0, 0, bdtr(np.maximum(allowed, 0), answers, (counts[:, 1] + 0.5) / (counts[:, 0] + 1))
    )
    start = int(np.argmax(expected))
    result = Abstention(risk, confidence, None, len(scores))
    for threshold, (answered, errors) in zip(grid[start:], _counts(scores, correct, grid[start:]), strict=True):
        if errors > allowed_errors(answered, risk, confidence):
            break
        result = Abstention(risk, confidence, float(threshold), len(scores), answered, errors)
    if result.threshold is not None:
        return result
    # An advice from the error rates of the test alone: those of the guide may be better, and would promise what failed.
    quantile, needs = NormalDist().inv_cdf, []
    for answered, errors in _counts(scores, correct, grid):
        rate = (errors + 0.5) / (answered + 1)
        if answered and rate < risk:
            # About how many answers it takes to reject `risk` where the error rate is `rate`, mostly.
            spread = quantile(confidence) * math.sqrt(risk * (1 - risk))
            spread += quantile(_POWER) * math.sqrt(rate * (1 - rate))
            wanted = max(least_answers(risk, confidence), (max(spread, 0.0) / (risk - rate)) ** 2)
            # So many as there are were not enough.
            needs.append(max(math.ceil(wanted * len(scores) / answered), len(scores) + 1))
    if len(scores) < 1 / risk:  # nobody knows any rate
        needs.append(max(least_answers(risk, confidence), len(scores) + 1))
    return replace(result, needed=min(needs, default=None))


def certify(scores: np.ndarray, correct: np.ndarray, risk: float, confidence: float) -> Abstention:
    """Return `find_threshold` on a random half of the examples, the same each time, with the other half as its guide.

    Raises:
        IVONError: fewer than 4 examples, or as `check_risk` does.
    """
    check_risk(risk, confidence)
    if len(scores) < 4:
        raise IVONError(f"{param_ref('risk')}: {len(scores)} examples cannot be split in two halves; give more")
    order = np.random.default_rng(0).permutation(len(scores))
    guide, test = order[: len(order) // 2], order[len(order) // 2 :]
    return find_threshold(scores[test], correct[test], scores[guide], correct[guide], risk=risk, confidence=confidence)


def _counts(scores: np.ndarray, correct: np.ndarray, grid: np.ndarray) -> list[tuple[int, int]]:
    """Return, for every threshold, how many scores reach it and how many of those are wrong."""
    order = np.argsort(-scores, kind="stable")
    wrong = np.concatenate([[0], np.cumsum(1 - correct[order])])
    answered = np.searchsorted(-scores[order], -grid, side="right")
    return [(int(n), int(k)) for n, k in zip(answered, wrong[answered], strict=True)]
