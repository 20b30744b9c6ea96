"""The area under the ROC curve against torchmetrics, and weights against repetitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc

from axolotl_ivon.metrics.auroc import auroc


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_that_of_torchmetrics(values: list[tuple[int, bool]]) -> None:
    score, positive = np.array([v / 5 for v, _ in values]), np.array([p for _, p in values])
    found = auroc(score, positive)
    assert found.shape == ()
    if positive.all() or not positive.any():
        assert np.isnan(found)
    else:
        expected = binary_auroc(torch.from_numpy(score), torch.from_numpy(positive).long())
        assert found == pytest.approx(float(expected), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_weights_count_as_repetitions(values: list[tuple[int, bool, int]]) -> None:
    score, positive, times = (np.array(column) for column in zip(*values, strict=True))
    found = auroc(score, positive, np.stack([times, np.ones(len(times))]))
    assert found.shape == (2,)
    if times.any():
        np.testing.assert_allclose(found[0], auroc(score.repeat(times), positive.repeat(times)))
    else:
        assert np.isnan(found[0])
    np.testing.assert_allclose(found[1], auroc(score, positive))
