"""Prediction sets: the right label is in them as often as promised, over random splits, whatever the model."""

from __future__ import annotations

import numpy as np
import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.decisions.conformal import check_coverage, describe, find_set, labels_in_set

SPLITS, CALIBRATE, LABELS = 400, 99, 5


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 5.0], ids=["underconfident", "calibrated", "overconfident"])
@pytest.mark.parametrize("coverage", [0.6, 0.9])
def test_the_right_label_is_in_the_set_as_often_as_promised(sharpness: float, coverage: float) -> None:
    draw = np.random.default_rng(0)
    covered, sizes = [], []
    for _ in range(SPLITS):
        logits = draw.normal(size=(CALIBRATE + 200, LABELS)) * 2
        truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        target = (truth.cumsum(1) > draw.uniform(size=(len(logits), 1))).argmax(1)
        model = np.exp(sharpness * logits)
        model /= model.sum(1, keepdims=True)
        sets = find_set(model[:CALIBRATE], target[:CALIBRATE], model[CALIBRATE:], target[CALIBRATE:], coverage=coverage)
        covered.append(sets.covered)
        sizes.append(sets.size)
        labels = [labels_in_set(dict(enumerate(row)), sets.threshold) for row in model[CALIBRATE:]]  # type: ignore[arg-type]
        assert sets.size == np.mean([len(each) for each in labels])
        assert all(each[0] == row.argmax() for each, row in zip(labels, model[CALIBRATE:], strict=True))
    error = np.std(covered) / np.sqrt(SPLITS)
    assert coverage - 3 * error < np.mean(covered)
    # With 99 examples (n + 1)(1 − c) is whole, and the coverage exact but for texts whose set would be empty.
    if coverage == 0.9:
        assert np.mean(covered) < 0.9 + 3 * error + 0.005
    assert 1 <= np.mean(sizes) < LABELS


def test_the_threshold_by_hand_and_too_few_examples() -> None:
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
    target = np.array([0, 1, 0, 1])  # with probabilities 0.9, 0.3, 0.4, 0.8
    sets = find_set(probabilities, target, probabilities, target, coverage=0.6)  # ⌊5·0.4⌋ = 2, the second smallest
    assert (sets.threshold, sets.covered, sets.size) == (0.4, 0.75, 1.25)
    assert describe(sets) == (
        "sets that hold the right label of 60 % of the texts: every label with a probability of at least 0.4; on the "
        "other examples a set has 1.25 labels on average and holds the right one in 75.0 %"
    )
    assert labels_in_set({"a": 0.3, "b": 0.45, "c": 0.25}, 0.3) == ["b", "a"]
    assert labels_in_set({"a": 0.3, "b": 0.45, "c": 0.25}, 0.5) == ["b"]  # never empty
    few = find_set(probabilities, target, probabilities, target, coverage=0.9)
    assert (few.threshold, few.size) == (0.0, 2.0)
    assert describe(few) == "4 examples are too few for sets of 90 %: they hold every label; 9 are enough"
    half = describe(few, parts=2)
    assert half.endswith("for sets of 90 %: they hold every label; give 18, 9 of them for this test")
    with pytest.raises(IVONError, match=r"coverage 1 is outside \(0, 1\); 0.9 is 90 %"):
        check_coverage(1)
