"""The Fisher information against closed forms, an exact expectation over labels, and laplace's formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heard import Heard
from linear_gaussian import Toy
from texts import items

from axolotl_ivon import IVONError
from axolotl_ivon.fitting.fisher import Squarer, Squares, fisher, residual_loss, residuals
from axolotl_ivon.fitting.precision import Prior
from axolotl_ivon.models.gradients import ExampleGradients, adapter_parameters, example_losses, label_logits
from axolotl_ivon.models.session import load_model

MakeAdapter = Callable[..., Path]


def run(square: Squarer, batches: list) -> Squares:
    *_, last = fisher(square, batches, Squares({}, 0))
    return last


def test_sigma_is_that_of_the_diagonal_laplace_approximation() -> None:
    toy, count = Toy(), 200
    batches = [toy.examples[i : i + 7] for i in range(0, count, 7)]
    with ExampleGradients(toy.model, toy.parameters, toy.losses(torch.Generator().manual_seed(0))) as gradients:
        found = run(toy.squarer(gradients), batches)
    assert found.losses == count
    torch.testing.assert_close(found.information()["w"].double(), toy.hessian, rtol=1e-5, atol=1e-7)
    # Laplace: precision = Σ_n of the Hessians + that of the prior, s. Here λ = N and s = λ·δ.
    s = 5.0
    prior = Prior(float(count), s / count, 1.0)
    h = found.information()["w"]
    sigma = prior.sigma(h, prior.delta(h, toy.model.weight.detach()))
    closed = (toy.x.double().square().sum(0) + s).rsqrt().expand_as(sigma)
    torch.testing.assert_close(sigma.double(), closed, rtol=1e-5, atol=1e-7)


def test_labels_of_the_data_give_the_empirical_fisher() -> None:
    toy = Toy()
    with ExampleGradients(toy.model, toy.parameters, toy.losses()) as gradients:
        found = run(toy.squarer(gradients), [toy.examples[:90], toy.examples[90:]])
    residual = toy.x @ toy.model.weight.detach().T - toy.y
    expected = (residual[:, :, None] * toy.x[:, None, :]).double().square().mean(0)
    torch.testing.assert_close(found.information()["w"].double(), expected, rtol=1e-4, atol=1e-6)


def test_sampled_labels_have_the_fisher_information_as_their_mean(make_adapter: MakeAdapter) -> None:
    """Per loss, of texts with several labels: the variance of ∇ log p over the classes, added up over labels."""
    model = load_model(make_adapter(target_modules=["v_proj"]))
    parameters = adapter_parameters(model)
    texts = items(3)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    logits = label_logits(model, texts).logits
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
        found = run(Squarer(gradients, lambda item: len(item.positions)), [texts] * 120)
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


def test_fewer_examples_at_once_when_the_memory_runs_out() -> None:
    toy, sizes, heard = Toy(), [], Heard()
    plain = toy.losses()

    def losses(some):
        sizes.append(len(some))
        if len(some) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(some)

    with ExampleGradients(toy.model, toy.parameters, losses) as gradients:
        found = run(Squarer(gradients, lambda example: 1, heard), [toy.examples[:10], toy.examples[10:20]])
    with ExampleGradients(toy.model, toy.parameters, plain) as gradients:
        expected = run(toy.squarer(gradients), [toy.examples[:20]])
    torch.testing.assert_close(found.total["w"], expected.total["w"])
    assert found.losses == 20
    assert max(sizes[5:]) <= 3
    assert heard.notes[0] == "out of memory with 10 examples in a batch; going on with 5"

    def hopeless(some):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with (
        ExampleGradients(toy.model, toy.parameters, hopeless) as gradients,
        pytest.raises(IVONError, match=r"^out of memory with a single example; use load_in"),
    ):
        run(Squarer(gradients, lambda example: 1), [toy.examples[:4]])
