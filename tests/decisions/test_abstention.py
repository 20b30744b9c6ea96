"""Abstention: what is promised holds as often as promised, on synthetic scores whose true risk is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.decisions.abstention import (
    Abstention,
    allowed_errors,
    certify,
    check_risk,
    find_threshold,
    least_answers,
)
from axolotl_ivon.metrics.selective import upper_bound


def exact_cdf(most: int, trials: int, probability: Fraction) -> Fraction:
    terms = (math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(most + 1))
    return sum(terms, Fraction(0))


@settings(max_examples=30)
@given(st.integers(0, 80), st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from([0.8, 0.9, 0.95]))
def test_as_many_errors_are_allowed_as_the_exact_sum_and_the_bound_say(
    answered: int, risk: float, confidence: float
) -> None:
    failure = Fraction(str(1 - confidence)).limit_denominator(100)
    by_sum = [k for k in range(answered) if exact_cdf(k, answered, Fraction(str(risk))) <= failure]
    most = allowed_errors(answered, risk, confidence)
    assert most == max(by_sum, default=-1)
    by_bound = [k for k in range(answered) if upper_bound(k, answered, confidence) <= risk + 1e-9]
    assert most == max(by_bound, default=-1)
    assert (most >= 0) == (answered >= least_answers(risk, confidence))


def test_the_bound_solves_its_equation() -> None:
    for errors, answered in ((0, 10), (3, 50), (40, 200)):
        bound = Fraction(upper_bound(errors, answered, 0.9))
        assert float(exact_cdf(errors, answered, bound)) == pytest.approx(0.1, abs=1e-9)
    assert upper_bound(10, 10, 0.9) == upper_bound(0, 0, 0.9) == 1


def empirical(scores: np.ndarray, correct: np.ndarray) -> Callable[[float], float]:
    """Return the rule that promises nothing: the loosest threshold whose answers are wrong at most so often here."""
    order = np.argsort(-scores)
    rates = np.cumsum(1 - correct[order]) / np.arange(1, len(order) + 1)
    return lambda risk: float(scores[order][np.flatnonzero(rates <= risk).max()]) if (rates <= risk).any() else 1.0


@pytest.mark.parametrize(
    ("wrong", "true_risk", "risk", "splits", "least", "plain"),
    [
        # Confidences c, uniform on [0.5, 1], that are right with probability c: from t on, (1 − t)/2 are wrong.
        (lambda c: 1 - c, lambda t: (1 - t) / 2, 0.1, 4000, -1, 0.4),
        # Every threshold is just too risky, and the test is not won by promising nothing.
        (lambda c: np.full_like(c, 0.101), lambda t: 0.101, 0.1, 1000, 0.02, 0.9),
        # Wrong with probability c − 0.5: from t on, (t + 1)/2 − 0.5 are wrong, least of all at t = 0.5, a quarter.
        (lambda c: c - 0.5, lambda t: t / 2, 0.2, 1000, -1, -1),
    ],
    ids=["calibrated", "all too risky", "the surest are the worst"],
)
def test_the_promise_holds_as_often_as_promised(
    wrong: Callable[[np.ndarray], np.ndarray],
    true_risk: Callable[[float], float],
    risk: float,
    splits: int,
    least: float,
    plain: float,
) -> None:
    """How often, over random splits, the risk is above `risk`: by the test, and more than `plain` by the plain rate."""
    random = np.random.default_rng(0)
    broken = np.zeros(2)
    for _ in range(splits):
        scores = random.uniform(0.5, 1, 400)
        correct = (random.random(400) >= wrong(scores)).astype(float)
        found = find_threshold(scores[:250], correct[:250], scores[250:], correct[250:], risk=risk, confidence=0.9)
        promised = found.threshold is not None and true_risk(max(0.5, found.threshold)) > risk
        broken += [promised, true_risk(empirical(scores[:250], correct[:250])(risk)) > risk]
    certified, empirically = broken / splits
    assert least < certified <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 1000)  # standard errors in the fewest splits
    assert empirically > plain


def test_much_is_answered_where_much_can_be() -> None:
    random = np.random.default_rng(1)
    scores = random.uniform(0.5, 1, 4000)
    correct = (random.random(4000) < scores).astype(float)
    found = find_threshold(scores[:2000], correct[:2000], scores[2000:], correct[2000:], risk=0.1)
    assert 0.8 <= found.threshold <= 0.88  # (1 − 0.8)/2 = 0.1
    assert found.coverage == pytest.approx(np.mean(scores[:2000] >= found.threshold))
    assert found.errors == np.sum(1 - correct[:2000][scores[:2000] >= found.threshold])
    assert found.document()["certified_on"]["bound"] <= 0.1


def test_ties_and_few_values_are_answered_together() -> None:
    # Shares of eight votes: a threshold never parts equal confidences.
    votes = np.repeat([1.0, 0.875, 0.5], 200)
    correct = np.concatenate([np.ones(200), np.tile([1.0] * 49 + [0.0], 4), np.tile([1.0, 0.0], 100)])
    found = find_threshold(votes, correct, votes, correct, risk=0.05)
    assert (found.threshold, found.answered, found.errors) == (0.875, 400, 4)


def test_what_is_needed_is_told_and_is_enough() -> None:
    random = np.random.default_rng(2)

    def split(count: int) -> Abstention:
        scores = random.uniform(0.5, 1, 2 * count)
        correct = (random.random(2 * count) >= 0.01).astype(float)
        return find_threshold(scores[:count], correct[:count], scores[count:], correct[count:], risk=0.05)

    few = split(30)
    assert few.threshold is None
    assert least_answers(0.05, 0.9) == 45 <= few.needed
    assert few.document()["coverage"] is None
    assert f"about {2 * few.needed} would, {few.needed} of them for this test" in few.describe(share=0.5)
    assert np.mean([split(few.needed).threshold is not None for _ in range(40)]) > 0.6


@given(st.integers(4, 60), st.integers(0, 20), st.integers(0, 99))
def test_what_was_not_enough_is_not_said_to_be(count: int, wrong: int, seed: int) -> None:
    """A guide that is right all over does not promise for the examples that were not."""
    random = np.random.default_rng(seed)
    scores, correct = random.uniform(0.5, 1, count), (np.arange(count) >= wrong).astype(float)
    found = find_threshold(scores, correct, random.uniform(0.5, 1, count), np.ones(count), risk=0.05)
    assert found.threshold is not None or found.needed is None or found.needed > count


def test_from_very_few_the_least_number_is_told() -> None:
    few = find_threshold(np.full(3, 0.9), np.ones(3), np.full(3, 0.9), np.ones(3), risk=0.05)
    assert (few.threshold, few.needed) == (None, 45)
    with pytest.raises(IVONError, match="3 examples cannot be split in two halves"):
        certify(np.full(3, 0.9), np.ones(3), 0.05, 0.9)


def test_halves_share_nothing_and_all_is_answered_where_nothing_is_wrong() -> None:
    found = certify(np.full(101, 0.9), np.ones(101), 0.05, 0.9)
    assert (found.examples, found.answered, found.threshold, found.coverage) == (51, 51, 0.0, 1.0)


def test_a_threshold_that_no_example_reaches_tells_nothing() -> None:
    """The surest confidences of the guide are above all of the test's, at a risk above one half."""
    result = find_threshold(np.full(6, 0.5), np.zeros(6), np.linspace(0.6, 0.9, 8), np.zeros(8), risk=0.6)
    assert (result.threshold, result.needed) == (None, None)


def test_no_number_is_enough_where_the_surest_are_wrong_too_often() -> None:
    scores = np.linspace(0.5, 1, 200)
    correct = np.tile([1.0, 0.0], 100)
    found = find_threshold(scores, correct, scores, correct, risk=0.05)
    assert (found.threshold, found.needed) == (None, None)
    assert "even the surest answers are wrong too often" in found.describe()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 5.0, math.nan])
def test_a_share_outside_is_refused(value: float) -> None:
    with pytest.raises(IVONError, match=r"risk .* is outside \(0, 1\); 0.05 is 5 %"):
        check_risk(value, 0.9)
    with pytest.raises(IVONError, match=r"confidence .* is outside \(0, 1\)"):
        check_risk(0.1, value)
