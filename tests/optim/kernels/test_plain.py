"""The kernels in torch's operations: what a step is judged by, and δ and 1−β1^t of every part."""

from __future__ import annotations

import math

import pytest
import torch
from toy import chunk_of

from axolotl_ivon.optim.kernels import plain
from axolotl_ivon.optim.kernels.base import MAX_STEP, Constants, Terms

BAD = math.nan


@pytest.mark.parametrize(
    ("at_draw", "now", "decision"),
    [
        ([1.0, 3.0], [4.0, 12.0], (1, 2)),  # the norm is the root of the sum
        ([0.0, 0.0], [0.0, 0.0], (1, 1)),
        ([1e-38, 0.0], [1e38, 0.0], (1, MAX_STEP)),
    ],
)
def test_a_finite_gradient_is_taken_with_the_ratio_of_its_norms(
    at_draw: list[float], now: list[float], decision: tuple[float, float]
) -> None:
    found, report = plain.judge(torch.tensor(at_draw), torch.tensor(now), torch.tensor([0, 1]), (4, 3, 1))
    assert found == pytest.approx(decision)
    assert report == (4, 0, 1)


@pytest.mark.parametrize(
    ("at_draw", "now", "tensor"),
    [
        ([1.0, BAD, BAD], [BAD, BAD, BAD], 5),  # the smallest number of those that were bad at the draw
        ([1.0, 1.0, 1.0], [BAD, 1.0, 1.0], 9),
        ([1.0, math.inf, 1.0], [BAD, BAD, BAD], 3),  # of no tensor alone
        ([1.0, 3e38, 3e38], [1.0, 1.0, 1.0], 3),
    ],
)
def test_a_gradient_that_is_not_finite_is_counted_and_named(
    at_draw: list[float], now: list[float], tensor: int
) -> None:
    found, report = plain.judge(torch.tensor(at_draw), torch.tensor(now), torch.tensor([9, 7, 5]), (4, 3, 1))
    assert not found[0]
    assert report == (5, 4, tensor)


@torch.no_grad()
def test_every_part_has_its_own_delta_step_count_and_rate_and_a_skipped_step_writes_nothing() -> None:
    """Two parts at once, against one at a time."""
    constants = Constants(ess=1e3, beta1=0.9, bound=1e-2, fixed=False)
    h_hat = torch.linspace(-1e-3, 1e-3, 20)
    by_part = torch.tensor([[0.1, 0.7], [0.1, 0.19], [1e-2, 3e-2], [1e-2, 0.1]])
    results = []
    for together in (True, False):
        chunk = chunk_of([12, 8])
        for param in chunk.params:
            param.grad = param.cos()
        before = chunk.precision.clone()
        plain.update(chunk, h_hat, Terms(*by_part), (0.0, 1.0), constants)
        assert torch.equal(chunk.precision, before)
        for part in range(2):
            values = by_part if together else by_part[:, part : part + 1].expand(-1, 2)
            one = chunk_of([12, 8])
            for param, given in zip(one.params, chunk.params, strict=True):
                param.grad = given.grad
            plain.update(one, h_hat, Terms(*values), (1.0, 0.5), constants)
            results.append([flat[[slice(12), slice(12, 20)][part]] for flat in (one.mean, one.momentum, one.precision)])
    for left, right in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0)
