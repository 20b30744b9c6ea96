"""Selective prediction against loops over the definitions, and orders of equal confidences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon.metrics.selective import RiskCoverage, adaptive_calibration_error, is_below, prr

Values = list[tuple[int, bool]]
tied = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=7)
untied = st.lists(st.booleans(), min_size=2, max_size=25).flatmap(
    lambda wrong: st.permutations(range(len(wrong))).map(lambda order: list(zip(order, wrong, strict=True)))
)


def columns(values: Values) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c / 40 for c, _ in values]), np.array([float(w) for _, w in values])


def risks(values: Values) -> list[float]:
    """The error rate of the first k by falling confidence, for every k."""
    wrong = [w for _, w in sorted(values, key=lambda value: -value[0])]
    return [sum(wrong[:k]) / k for k in range(1, len(wrong) + 1)]


def trapezoid(values: list[float]) -> float:
    steps = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    return sum(steps) / len(steps)


@given(tied)
def test_the_curve_is_that_of_answering_above_each_threshold(values: Values) -> None:
    confidence, wrong = columns(values)
    kept = [wrong[confidence >= threshold] for threshold in sorted(set(confidence), reverse=True)]
    expected = [[len(answered) / len(wrong) for answered in kept], [answered.mean() for answered in kept]]
    assert np.allclose(RiskCoverage(confidence, wrong).curve(), expected)


@given(untied)
def test_every_figure_follows_its_definition(values: Values) -> None:
    curve, r = RiskCoverage(*columns(values)), risks(values)
    n = len(r)
    assert curve.area() == pytest.approx(sum(r))
    assert curve.aurc() == pytest.approx(trapezoid(r))
    assert curve.augrc() == pytest.approx(trapezoid([x * k / n for k, x in enumerate(r, 1)]))
    assert curve.risk_at(0.8) == pytest.approx(r[math.ceil(0.8 * n) - 1])
    for risk in (0.05, 0.25, 0.5):
        within = [k for k, x in enumerate(r, 1) if x <= risk]
        assert curve.coverage_at(risk) == pytest.approx(within[-1] / n if within else math.nan, nan_ok=True)
    assert curve.loss(np.arange(n + 1)) == pytest.approx([0, *(x * k for k, x in enumerate(r, 1))])


def test_a_confidence_within_rounding_of_the_threshold_is_not_below_it() -> None:
    assert not is_below(0.7 - 5e-7, 0.7)
    assert is_below(0.7 - 2e-6, 0.7)


@given(tied)
def test_the_order_of_equal_confidences_is_random(values: Values) -> None:
    orders = [
        [(n - place, wrong) for place, (_, wrong) in enumerate(order)]
        for order in itertools.permutations(values)
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
        for n in [len(order)]
    ]
    curve = RiskCoverage(*columns(values))
    expected = np.mean([risks(order) for order in orders], axis=0).tolist()
    assert curve.aurc() == pytest.approx(trapezoid(expected))
    assert curve.augrc() == pytest.approx(trapezoid([r * k / len(expected) for k, r in enumerate(expected, 1)]))
    assert curve.risk_at(0.8) == pytest.approx(expected[math.ceil(0.8 * len(expected)) - 1])
    for risk in (0.05, 0.3):
        within = [k for k, r in enumerate(expected, 1) if r <= risk + 1e-12]
        found = curve.coverage_at(risk) * len(expected)
        assert found == pytest.approx(within[-1] if within else math.nan, nan_ok=True)


def test_one_prediction_has_no_area() -> None:
    curve = RiskCoverage(np.array([0.5]), np.array([1.0]))
    assert np.isnan([curve.aurc(), curve.augrc(), curve.coverage_at(0.05)]).all()
    assert curve.risk_at(0.8) == 1


def test_a_risk_that_is_met_exactly_counts() -> None:
    # 1 of 20 is 5 %, whatever 0.05 is in binary; the 41st would be 2 of 41, and the 40th 2 of 40.
    wrong = np.zeros(41)
    wrong[[10, 39, 40]] = 1
    assert RiskCoverage(-np.arange(41.0), wrong).coverage_at(0.05) == 40 / 41


@given(st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=10, max_size=40, unique_by=lambda v: v[0]))
def test_bins_hold_equally_many(values: Values) -> None:
    confidence, correct = np.array([c / 500 for c, _ in values]), np.array([float(w) for _, w in values])
    order = np.argsort(confidence)
    gaps = [abs((correct[part] - confidence[part]).sum()) for part in np.array_split(order, 10)]
    assert adaptive_calibration_error(confidence, correct) == pytest.approx(sum(gaps) / len(values))


def test_fewer_predictions_than_bins_have_a_bin_each() -> None:
    assert adaptive_calibration_error(np.array([0.9, 0.6]), np.array([1.0, 0.0])) == pytest.approx((0.1 + 0.6) / 2)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=6, unique_by=lambda v: v[0]))
def test_prr_is_the_share_of_the_best_gain_over_chance(values: list[tuple[int, int]]) -> None:
    confidence, quality = (np.array(column, float) for column in zip(*values, strict=True))

    def area(order: np.ndarray) -> float:  # of the mean quality of the first k, over k
        return float(np.mean([quality[order][:k].mean() for k in range(1, len(order) + 1)]))

    if len(set(quality)) == 1:
        assert np.isnan(prr(confidence, quality))
        return
    chance = np.mean([area(np.array(order)) for order in itertools.permutations(range(len(values)))])
    expected = (area(np.argsort(-confidence)) - chance) / (area(np.argsort(-quality)) - chance)
    assert prr(confidence, quality) == pytest.approx(expected)
    assert prr(quality, 2 * quality - 7) == pytest.approx(1)
    assert prr(np.ones(len(values)), quality) == pytest.approx(0, abs=1e-9)


def test_prr_is_that_of_lm_polygraph() -> None:
    # PredictionRejectionArea, get_random_scores and normalize_metric of lm-polygraph 0.7.0, on uncertainties that are
    # the negative of these confidences. Its chance is the mean of 1,000 shuffles, hence the tolerance.
    confidence = np.array([0.31, 0.95, 0.12, 0.77, 0.58, 0.44, 0.83, 0.26])
    quality = np.array([0.2, 0.9, 0.4, 0.5, 0.8, 0.1, 0.6, 0.3])
    assert prr(confidence, quality) == pytest.approx(0.774, abs=0.01)
