"""The rates of a run, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from axolotl_ivon.training.rates import rate_for, rates


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
