"""δ against the equation that it solves, by a plain fixed-point iteration in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_ivon.fitting.precision import Prior


def iterated(h: torch.Tensor, m: torch.Tensor, ess: float, kappa: float) -> float:
    """δ = κ/(λ·mean(m² + σ²)) again and again, σ² = 1/(λ·(h + δ))."""
    h, m = h.double(), m.double()
    delta = kappa * float(h.max())
    for _ in range(20000):
        sigma2 = 1 / (ess * (h + delta))
        delta = kappa / (ess * float((m.square() + sigma2).mean()))
    return delta


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(1e2, 1e6), st.floats(1e-3, 1.0), st.floats(0.1, 3.0))
def test_the_empirical_prior_is_at_its_fixed_point(
    seed: int, kappa: float, ess: float, size: float, spread: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    h = 1e-3 * (spread * torch.randn(50, 4, generator=draw)).exp()
    m = size * torch.randn(50, 4, generator=draw)
    delta = Prior(ess, "empirical", kappa).delta(h, m)
    sigma2 = 1 / (ess * (h.double() + delta))
    again = kappa / (ess * float((m.double().square() + sigma2).mean()))
    assert math.isclose(again, delta, rel_tol=1e-6)
    assert math.isclose(iterated(h, m, ess, kappa), delta, rel_tol=1e-3)


def test_weights_that_no_example_depends_on_have_the_prior_and_no_say_in_it() -> None:
    draw = torch.Generator().manual_seed(0)
    h, m = torch.rand(100, generator=draw), torch.randn(100, generator=draw)
    prior = Prior(1e3, "empirical", 0.1)
    alone = prior.delta(h, m)
    more = prior.delta(torch.cat([h, torch.zeros(900)]), torch.cat([m, torch.ones(900)]))
    assert math.isclose(alone, more, rel_tol=1e-9)
    sigma = prior.sigma(torch.cat([h, torch.zeros(900)]), more)
    torch.testing.assert_close(sigma[100:], torch.full((900,), (1e3 * more) ** -0.5))


def test_a_tensor_without_information_has_the_width_of_its_mean() -> None:
    m = torch.tensor([3.0, -4.0])
    prior = Prior(100.0, "empirical", 0.25)
    sigma = prior.sigma(torch.zeros(2), prior.delta(torch.zeros(2), m))
    torch.testing.assert_close(sigma.square(), torch.full((2,), 4 * 12.5))


@pytest.mark.parametrize("kappa", [0.1, 1.0])
@pytest.mark.parametrize("h", [0.0, 1e-3])
def test_a_mean_of_0_has_a_finite_width(h: float, kappa: float) -> None:
    prior = Prior(1e5, "empirical", kappa)
    information = torch.full((5,), h)
    sigma = prior.sigma(information, prior.delta(information, torch.zeros(5)))
    assert sigma.isfinite().all()
    assert (sigma > 0).all()
    if h and kappa < 1:  # λσ²·(h + δ) = 1 and δ/(h + δ) = κ
        torch.testing.assert_close(sigma.square(), torch.full((5,), (1 - kappa) / (1e5 * h)))


def test_a_fixed_prior_is_a_number() -> None:
    h = torch.tensor([0.0, 1.0])
    prior = Prior(10.0, 0.5, 2.0)
    torch.testing.assert_close(prior.sigma(h, prior.delta(h, torch.ones(2))).square(), 1 / (10 * (h + 1.0)))
