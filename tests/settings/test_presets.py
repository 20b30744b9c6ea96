"""Presets, against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import effective_sample_size
from axolotl_ivon.settings.presets import PRESETS


def test_lambda_and_h0_are_the_paper_s_or_from_what_the_draws_may_cost() -> None:
    paper, auto = PRESETS["paper"], PRESETS["auto"]
    assert paper.ess(900, 10**6) == effective_sample_size(900, 5000.0)
    assert paper.first_h0(1e5, [4096] * 1000) == 0.05
    assert auto.ess(256, 92_160) == 256_000
    assert auto.ess(10, 896) == 250_000
    # All of p from the data: σ² = 1/(λ·h), so Σ ½·h·σ² of an example, times their number, is 50 nats.
    ess = auto.ess(900, 460_800)
    h = torch.rand(460_800, dtype=torch.float64)
    assert 900 * float((h / (ess * h)).sum()) / 2 == pytest.approx(50)
    # 60 matrices of 576 inputs: each has variance 1/1728, and 60·1728·σ² is to be 64 at the start.
    assert 60 * 1728 / (ess * auto.first_h0(ess, [576] * 60)) == pytest.approx(64)
    assert 2 * 1728 / (ess * auto.first_h0(ess, [576] * 2)) == pytest.approx(2 * 4)
    with pytest.raises(ValueError, match="training examples"):
        auto.ess(0, 5)


@given(st.integers(1, 10**6), st.integers(1, 10**9), st.floats(0, 1000), st.floats(0, 1000))
def test_few_examples_count_as_more_in_a_short_run(size: int, weights: int, epochs: float, more: float) -> None:
    auto = PRESETS["auto"]
    assert auto.ess(128, 896, 62) == 128_000
    assert auto.ess(10, 896, 62) == auto.ess(10, 896, 20) == 125_000
    assert auto.ess(10, 896, 15) == 187_500
    ess = auto.ess(size, weights, epochs)
    assert ess >= auto.ess(size, weights, epochs + more)
    assert ess >= 1000 * size
    if size >= 250 or epochs <= 10:
        assert ess == auto.ess(size, weights)
    assert PRESETS["paper"].ess(size, weights, epochs) == PRESETS["paper"].ess(size, weights)


def test_the_memory_is_a_fifth_of_the_run() -> None:
    auto = PRESETS["auto"]
    assert 1 / (1 - auto.second_beta(5000)) == pytest.approx(1000)
    assert auto.second_beta(1) == auto.second_beta(50) == 0.9
    assert PRESETS["paper"].second_beta(7) == 0.9995
