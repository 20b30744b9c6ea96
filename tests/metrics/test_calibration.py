"""Temperature scaling against a closed form, a grid, and PyTorch's own cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon.metrics.calibration import TEMPERATURES, fit_temperature, rescale


def test_equal_bets_have_a_closed_form() -> None:
    # All bet 0.9 on one side and 7 of 10 are right: the best bet is 0.7, and log-odds are divided by T.
    p = torch.tensor([[0.9, 0.1]] * 10, dtype=torch.float64)
    target = torch.tensor([0] * 7 + [1] * 3)
    temperature = fit_temperature(p, target)
    assert temperature == pytest.approx(math.log(9) / math.log(7 / 3))
    torch.testing.assert_close(rescale(p, temperature)[0], torch.tensor([0.7, 0.3], dtype=torch.float64))


@given(st.integers(0, 10_000), st.floats(0.2, 5))
def test_no_temperature_on_a_grid_is_better(seed: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    p = (logits * sharpness).softmax(1)

    def nll(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits * sharpness / temperature, target).item()

    found = fit_temperature(p, target)
    assert nll(found) <= min(nll(t) for t in torch.logspace(-2, 2, 101).tolist()) + 1e-9
    expected = (logits * sharpness / found).softmax(1)
    torch.testing.assert_close(rescale(p, found), expected)
    # The float32 distributions of the task "generate" have the same minimum.
    assert nll(fit_temperature(p.float(), target)) == pytest.approx(nll(found), abs=1e-6)


def test_what_has_no_minimum_is_at_a_limit() -> None:
    p = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    assert fit_temperature(p, torch.tensor([0, 1])) == TEMPERATURES[0]  # all right: the surer the better
    assert fit_temperature(p, torch.tensor([1, 0])) == TEMPERATURES[1]  # all wrong
    impossible = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert 1 < fit_temperature(impossible, torch.tensor([0, 1])) <= TEMPERATURES[1]
    torch.testing.assert_close(rescale(impossible, 1), impossible)
