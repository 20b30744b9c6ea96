"""The area under the ROC curve and detection against torchmetrics and scikit-learn, and weights against repetitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_auroc

from axolotl_ivon.metrics.auroc import auroc, detection


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30))
def test_figures_are_those_of_others_and_weights_count_as_repetitions(values: list[tuple[int, bool, int]]) -> None:
    score, positive, times = (np.array(column) for column in zip(*values, strict=True))
    score = score / 9
    weights = np.stack([times, np.ones(len(times))])
    both = auroc(score, positive, weights)
    repeated = score.repeat(times), positive.repeat(times)
    for found, (one, right) in zip(both, [repeated, (score, positive)], strict=True):
        if len({*right.tolist()}) < 2:
            assert np.isnan(found)
            continue
        assert found == pytest.approx(roc_auc_score(right, one))
        assert found == pytest.approx(float(binary_auroc(torch.from_numpy(one), torch.from_numpy(right).long())))
        told = detection(one, right)
        assert told["auroc"].shape == ()
        assert told["auroc"] == pytest.approx(found)
        assert told["aupr"] == pytest.approx(average_precision_score(right, one))
        misses, hits, _ = roc_curve(right, one, drop_intermediate=False)
        assert told["fpr95"] == pytest.approx(misses[hits >= 0.95][0])
    if not np.isnan(both).any():
        for name, pair in detection(score, positive, weights).items():
            assert pair == pytest.approx([detection(*repeated)[name], detection(score, positive)[name]])
