"""Presets, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from axolotl_ivon import effective_sample_size
from axolotl_ivon.settings.presets import PRESETS, rate_for, rates


@settings(deadline=None)  # torch's first step imports for a second
@given(
    shape=st.lists(st.floats(0.01, 1), min_size=1, max_size=30),
    travel=st.floats(1e-3, 10),
    clip=st.floats(1e-4, 1),
)
def test_the_rates_of_a_run_add_up_to_the_travel(shape: list[float], travel: float, clip: float) -> None:
    def schedule(lr: float, optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: shape[min(step, len(shape) - 1)])

    lr = rate_for(travel, clip, len(shape), schedule)
    assert lr * sum(shape) * clip == pytest.approx(travel)


def test_a_schedule_that_is_no_function_of_the_step_is_followed_too() -> None:
    def schedule(lr: float, optimizer: Any) -> OneCycleLR:
        return OneCycleLR(optimizer, max_lr=lr, total_steps=9)

    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, travelled = schedule(rate_for(0.15, 0.01, 8, schedule), optimizer), 0.0
    for _ in range(8):
        travelled += 0.01 * scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
    assert travelled == pytest.approx(0.15)


def test_a_floor_that_is_no_share_of_the_peak_counts() -> None:
    floor = 0.4

    def schedule(lr: float, optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: max(1 - step / 4, floor / lr))

    # Four steps: lr·(1 + ¾ + ½) and the floor, which is higher than lr/4.
    assert rate_for(0.03, 0.01, 4, schedule) == pytest.approx((3 - floor) / 2.25, rel=1e-5)


def test_what_wants_a_loss_is_taken_to_stay_at_its_peak() -> None:
    class Plateau:
        def step(self, loss: float) -> None:
            raise AssertionError

    assert rate_for(0.15, 0.01, 10, lambda lr, optimizer: Plateau()) == pytest.approx(1.5)
    assert rates(Plateau(), 0.1, 3) == [0.1] * 3


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
