"""The information and the prior against closed forms, and σ at their fixed points."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_examples
from torch import Tensor, nn

from axolotl_ivon.fitting.fisher import Squares, residual_loss, residuals, squarer
from axolotl_ivon.fitting.ivon import FEWEST, SETTLED, Averages, iterate
from axolotl_ivon.fitting.precision import Prior
from axolotl_ivon.models.gradients import ExampleGradients, adapter_parameters, example_losses, label_logits
from axolotl_ivon.models.session import load_model

MakeAdapter = Callable[..., Path]


class Toy:
    """y = W·x + noise: inputs of different sizes, and W that is off its optimum or on it.

    The loss of an example is ½·|y − W·x|², whose Hessian for every row of W is x·xᵀ.
    """

    def __init__(self, examples: int = 200, inputs: int = 6, outputs: int = 3, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(examples, inputs, generator=draw) * torch.linspace(0.1, 2, inputs)
        self.y = torch.randn(examples, outputs, generator=draw)
        self.model = nn.Linear(inputs, outputs, bias=False)
        self.model.weight.data = torch.randn(outputs, inputs, generator=draw)
        self.parameters = {"w": self.model.weight}
        self.examples = list(range(examples))
        self.hessian = self.x.double().square().mean(0).expand(outputs, -1)  # of the mean loss, diagonal

    def losses(self, signs: torch.Generator | None = None) -> Callable[[Sequence[int]], Tensor]:
        """Return the losses of some examples; with `signs` at labels W·x ± 1, of the model's variance."""

        def losses(some: Sequence[int]) -> Tensor:
            found = self.model(self.x[list(some)])
            if signs is None:
                target = self.y[list(some)]
            else:
                target = found.detach() + 2.0 * torch.randint(0, 2, found.shape, generator=signs) - 1
            return (target - found).square().sum(1) / 2

        return losses

    def squarer(self, gradients: ExampleGradients[int]) -> Callable[[Sequence[int]], Squares]:
        return squarer(gradients, lambda example: 1)


def test_sigma_is_that_of_the_diagonal_laplace_approximation() -> None:
    toy, count = Toy(), 200
    batches = [toy.examples[i : i + 7] for i in range(0, count, 7)]
    with ExampleGradients(toy.model, toy.parameters, toy.losses(torch.Generator().manual_seed(0))) as gradients:
        found = functools.reduce(Squares.add, map(toy.squarer(gradients), batches))
    assert found.losses == count
    torch.testing.assert_close(found.information()["w"].double(), toy.hessian, rtol=1e-5, atol=1e-7)
    # Laplace: precision = Σ_n of the Hessians + that of the prior, s. Here λ = N and s = λ·δ.
    s = 5.0
    prior = Prior(float(count), s / count, 1.0)
    h = found.information()["w"]
    sigma = prior.sigma(h, prior.delta(h, toy.model.weight.detach()))
    closed = (toy.x.double().square().sum(0) + s).rsqrt().expand_as(sigma)
    torch.testing.assert_close(sigma.double(), closed, rtol=1e-5, atol=1e-7)


def test_sampled_labels_have_the_fisher_information_as_their_mean(make_adapter: MakeAdapter) -> None:
    """Per loss, of texts with several labels: the variance of ∇ log p over the classes, added up over labels."""
    model = load_model(make_adapter(target_modules=["v_proj"]))
    parameters = adapter_parameters(model)
    texts = random_examples(3)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    logits, _, _ = label_logits(model, texts)
    exact = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    every = torch.eye(logits.shape[1])
    for row in logits:
        jacobians = torch.autograd.grad(row, list(parameters.values()), every, retain_graph=True, is_grads_batched=True)
        p = row.detach().softmax(-1)
        for name, jacobian in zip(parameters, jacobians, strict=True):
            mean, square = (torch.tensordot(p, x, 1) for x in (jacobian, jacobian.square()))
            exact[name] += (square - mean.square()) / len(logits)
    generator = torch.Generator().manual_seed(0)
    losses = functools.partial(example_losses, model, loss=residual_loss(generator))
    with ExampleGradients(model, parameters, losses) as gradients:
        square = squarer(gradients, lambda item: len(item.positions))
        found = functools.reduce(Squares.add, (square(texts) for _ in range(120)))
    assert found.losses == 120 * len(logits)
    for name, h in found.information().items():
        assert float(h.sum() / exact[name].sum()) == pytest.approx(1, abs=0.1), name
        assert torch.corrcoef(torch.stack([h.flatten(), exact[name].flatten()]))[0, 1] > 0.9, name


def test_random_residuals_have_the_covariance_of_a_drawn_label_s() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 6.0]]).expand(200_000, -1)
    found = residuals(logits, torch.Generator().manual_seed(0)).double()
    p = logits[0].double().softmax(-1)
    torch.testing.assert_close(found.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.T @ found / len(found), torch.diag(p) - p.outer(p), rtol=0, atol=1e-3)
    # Where the model is sure, a drawn label is nearly always the likeliest; these are all of one size.
    sure = residuals(torch.tensor([[0.0, 9.0]]).expand(1000, -1), torch.Generator().manual_seed(0)).square()
    assert float(sure.std() / sure.mean()) < 0.1


def batches(toy: Toy, size: int) -> Iterator[list[int]]:
    return itertools.cycle([toy.examples[i : i + size] for i in range(0, len(toy.examples), size)])


def fitted(toy: Toy, prior: Prior, size: int, start: float = 1e-2) -> Averages:
    with ExampleGradients(toy.model, toy.parameters, toy.losses(torch.Generator().manual_seed(0))) as gradients:
        *_, last = iterate(toy.parameters, toy.squarer(gradients), batches(toy, size), prior, start, Averages())
    return last


@pytest.mark.parametrize("kappa", [0.1, 1.0])
@pytest.mark.parametrize("kind", ["empirical", 0.3])
def test_sigma_is_that_of_the_diagonal_variational_posterior(kind: str | float, kappa: float) -> None:
    """λ·E_q[ℓ] + KL is least where 1/σ² = λ·(H_ii + δ), whatever the mean; with the KL-optimal prior δ follows σ."""
    toy, ess = Toy(), 50.0
    mean = toy.model.weight.detach().clone()
    prior = Prior(ess, kind, kappa)  # type: ignore[arg-type]
    progress = fitted(toy, prior, size=len(toy.examples))
    h = progress.information()["w"]
    sigma = prior.sigma(h, prior.delta(h, mean)).double()
    delta = kappa * 0.3
    for _ in range(1000 if kind == "empirical" else 0):
        sigma2 = 1 / (ess * (toy.hessian + delta))
        delta = kappa / (ess * float((mean.double().square() + sigma2).mean()))
    torch.testing.assert_close(sigma, (ess * (toy.hessian + delta)).rsqrt(), rtol=1e-4, atol=1e-7)
    assert progress.step == FEWEST
    assert progress.settled
    assert toy.model.weight.equal(mean)


def test_batches_are_averaged_until_the_error_is_small() -> None:
    toy, prior = Toy(), Prior(50.0, 0.3)
    progress = fitted(toy, prior, size=3)
    sigma = prior.sigma(progress.information()["w"], prior.delta(progress.information()["w"], toy.model.weight))
    error = (sigma.double() * (50 * (toy.hessian + 0.3)).sqrt()).log()
    assert progress.step > FEWEST
    assert (progress.change or math.inf) <= SETTLED
    assert float(error.square().mean().sqrt()) < 1.5 * SETTLED


def test_it_is_the_information_at_draws_and_not_at_the_mean() -> None:
    """Logistic regressions with a weight each: σ² = 1/(λ·(E_q[F] + δ)) by Gauss and Hermite's quadrature."""
    x = torch.linspace(0.5, 3, 40)
    model = nn.Linear(1, 60, bias=False)
    model.weight.data.fill_(4.0)
    ess, delta = 3.0, 0.005
    labels = torch.Generator().manual_seed(0)

    def losses(some: list[int]) -> Tensor:
        logit = model(x[some, None])
        y = torch.bernoulli(logit.detach().sigmoid(), generator=labels)
        return F.binary_cross_entropy_with_logits(logit, y, reduction="none").sum(1)

    def information(w: np.ndarray) -> np.ndarray:
        s = 1 / (1 + np.exp(-np.multiply.outer(w, x.numpy())))
        return (x.numpy() ** 2 * s * (1 - s)).mean(-1)

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    sigma = 0.1
    for _ in range(500):
        h = float(information(4.0 + sigma * nodes) @ weights / weights.sum())
        sigma = 0.5 * sigma + 0.5 / math.sqrt(ess * (h + delta))
    laplace = 1 / math.sqrt(ess * (float(information(np.array(4.0))) + delta))
    assert laplace > 1.5 * sigma
    prior = Prior(ess, delta)
    with ExampleGradients(model, {"w": model.weight}, losses) as gradients:
        square = squarer(gradients, lambda example: 1)
        steps = iterate({"w": model.weight}, square, itertools.repeat(list(range(40))), prior, 1.0, Averages())
        *_, progress = steps
    found = prior.sigma(progress.information()["w"], delta)
    assert float(found.log().mean().exp()) == pytest.approx(sigma, rel=SETTLED)
    assert float((found / sigma).log().square().mean().sqrt()) < 2 * SETTLED


def test_all_of_the_averages_is_kept() -> None:
    toy = Toy()
    with ExampleGradients(toy.model, toy.parameters, toy.losses()) as gradients:
        steps = iterate(toy.parameters, toy.squarer(gradients), batches(toy, 9), Prior(50.0), 0.1, Averages())
        *_, half = itertools.islice(steps, 13)
    assert half.earlier.keys() == {8, 11}
    assert half.change is not None
    delta = half.deltas["w"]  # that of the last checkpoint, where p = h + δ
    h = half.earlier[11]["w"] - delta
    assert delta == pytest.approx(Prior(50.0).delta(h, toy.model.weight.detach()), rel=1e-4)
    restored = Averages.restored(half.kept(), torch.device("cpu"))
    torch.testing.assert_close(vars(restored), vars(half), rtol=0, atol=0)


def test_the_mean_is_back_whatever_happens() -> None:
    toy = Toy()
    mean = toy.model.weight.detach().clone()
    seen = []

    def square(batch: list[int]) -> None:
        seen.append(toy.model.weight.detach().clone())
        raise KeyError

    with pytest.raises(KeyError):
        next(iterate(toy.parameters, square, batches(toy, 9), Prior(50.0), 0.1, Averages()))  # type: ignore[arg-type]
    assert not seen[0].equal(mean)
    assert toy.model.weight.equal(mean)


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
