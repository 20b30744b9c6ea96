"""Every implementation of the protocol against the float64 formulas."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference import ReferenceIVON
from toy import chunk_of

from axolotl_ivon.optim.kernels import agree, plain
from axolotl_ivon.optim.kernels.base import Constants, Terms

RATES, ESS, BETA1, BETA2, BOUND = (1e-2, 3e-2, 0.2), 1e3, 0.9, 0.99, 1e-2


@pytest.fixture(params=["plain", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"axolotl_ivon.optim.kernels.{request.param}")


def test_they_agree(kernels: Any) -> None:
    agree(kernels, plain, torch.device("cpu"))
    for name in ("noise", "draw", "squares", "collect"):
        with pytest.raises(AssertionError):
            right = getattr(kernels, name)
            wrong = SimpleNamespace(**vars(kernels))
            setattr(wrong, name, lambda *args, right=right, **kwargs: right(*args, **kwargs) * 1.01)
            agree(wrong, plain, torch.device("cpu"))


@pytest.mark.parametrize(
    ("prior", "hessian"),
    [
        ("empirical", "reparameterized"),
        (0.3, "reparameterized"),
        (0.3, "squared_gradients"),
        ("own", "reparameterized"),
        ("own", "squared_gradients"),
    ],
)
@torch.no_grad()
def test_one_step_is_that_of_the_reference(kernels: Any, prior: Any, hessian: str) -> None:
    squared = hessian == "squared_gradients"
    sizes = [37, 5, 1]
    chunk = chunk_of(sizes)
    references = []
    center, sigma = chunk.mean.sin(), chunk.mean.abs() * 0.1 + 0.05
    if prior == "own":
        chunk.prior = (center, sigma**-2)
    yesterday = zip(*(x.double().split(sizes) for x in (center, sigma)), strict=True)
    for m, g, p in zip(*(flat.split(sizes) for flat in (chunk.mean, chunk.momentum, chunk.precision)), strict=True):
        numbers = (ESS, BETA1, BETA2, 0.1, BOUND, "empirical" if prior == "own" else prior)
        reference = ReferenceIVON(m.double().numpy(), *numbers, hessian=hessian, batch_size=4)
        if prior == "own":
            reference.prior = tuple(x.numpy() for x in next(yesterday))
        reference.t, reference.g, reference.p = 4, g.double().numpy(), p.double().numpy()
        references.append(reference)
    moments = kernels.draw(chunk, kernels.noise(chunk, chunk.streams), ESS)
    thetas = [param.double().numpy().copy() for param in chunk.params]
    for param in chunk.params:
        param.grad = param.sin()
    gradients = [param.grad.double().numpy().copy() for param in chunk.params]
    h_hat = torch.empty_like(chunk.mean)
    squares = kernels.collect(chunk, h_hat, add=False, squared=squared)
    assert torch.equal(squares, kernels.squares(chunk))
    expected = [(gradient**2).sum() for gradient in gradients]
    np.testing.assert_allclose(kernels.squares(chunk).numpy(), expected, rtol=1e-5)
    sized = torch.tensor([float(size) for size in sizes])
    if prior == "own":
        deltas = torch.full_like(sized, 1 / ESS)
    else:
        deltas = sized / moments if prior == "empirical" else torch.full_like(sized, prior)
        np.testing.assert_allclose(deltas.numpy(), [reference.delta() for reference in references], rtol=1e-5)
    debias = torch.full_like(sized, 1 - BETA1**5)
    constants = Constants(ESS, BETA1, BOUND, fixed=prior != "empirical", batch=4.0 if squared else None)
    terms = Terms(deltas, debias, torch.tensor(RATES), torch.full_like(sized, 1 - BETA2))
    kernels.update(chunk, h_hat, terms, (1.0, 1.0), constants)
    for reference, theta, gradient, rate in zip(references, thetas, gradients, RATES, strict=True):
        reference.step([theta], [gradient], rate)
    for name, flat in (("m", chunk.mean), ("g", chunk.momentum), ("p", chunk.precision)):
        expected = np.concatenate([getattr(reference, name) for reference in references])
        np.testing.assert_allclose(flat.double().numpy(), expected, rtol=2e-5, atol=1e-7)
    assert torch.equal(torch.cat([*chunk.params]), chunk.mean)


@pytest.mark.parametrize(("bad", "expected"), [(3e38, np.inf), (np.inf, np.nan), (np.nan, np.nan)])
@torch.no_grad()
def test_squares_tell_an_overflow_from_a_gradient_that_is_not_finite(kernels: Any, bad: float, expected: float) -> None:
    chunk = chunk_of([9, 20])
    for param in chunk.params:
        param.grad = torch.ones_like(param)
    chunk.params[1].grad[7] = bad
    np.testing.assert_array_equal(kernels.squares(chunk).numpy(), [9, expected])
    squares = kernels.collect(chunk, torch.empty_like(chunk.mean), add=False)
    np.testing.assert_array_equal(squares.numpy(), [9, expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("squared", [False, True])
@torch.no_grad()
def test_a_second_draw_is_added_and_theta_is_what_was_rounded(kernels: Any, dtype: torch.dtype, squared: bool) -> None:
    chunk = chunk_of([50, 3], dtype)
    h_hat, total = torch.empty_like(chunk.mean), torch.zeros_like(chunk.mean)
    for draw in range(2):
        kernels.draw(chunk, kernels.noise(chunk, chunk.streams + np.uint64(draw)), ESS)
        for param in chunk.params:
            param.grad = param.cos()
        theta, gradient = (torch.cat(list(x)).float() for x in (chunk.params, (p.grad for p in chunk.params)))
        total += (gradient if squared else theta - chunk.mean) * gradient
        kernels.collect(chunk, h_hat, add=draw > 0, squared=squared)
    torch.testing.assert_close(h_hat, total, rtol=1e-5, atol=1e-7)
