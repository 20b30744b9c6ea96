"""What stands out: planted values, and nothing among too few or equal ones."""

from __future__ import annotations

import numpy as np

from axolotl_ivon.metrics.outliers import outliers


def test_planted_values_stand_out_and_no_others() -> None:
    values = np.random.default_rng(0).exponential(size=500)
    values[[3, 77]] = 200.0
    assert np.flatnonzero(outliers(values)).tolist() == [3, 77]
    assert not outliers(-values).any()  # below the others is not above them


def test_among_few_or_equal_values_none_stands_out() -> None:
    assert outliers([1.0] * 8 + [1e6]).tolist() == [False] * 9
    assert not outliers(np.ones(20)).any()
    assert not outliers([]).any()
