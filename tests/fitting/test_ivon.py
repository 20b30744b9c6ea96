"""σ of the variational method against closed forms, and a fixed point that is found by quadrature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_gaussian import Toy
from torch import Tensor, nn

from axolotl_ivon.fitting.fisher import Squarer
from axolotl_ivon.fitting.ivon import FEWEST, SETTLED, Averages, is_checkpoint, iterate
from axolotl_ivon.fitting.precision import Prior
from axolotl_ivon.models.gradients import ExampleGradients


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
    assert progress.change is not None
    assert progress.change <= SETTLED
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
        square = Squarer(gradients, lambda example: 1)
        steps = iterate({"w": model.weight}, square, itertools.repeat(list(range(40))), prior, 1.0, Averages())
        *_, progress = steps
    found = prior.sigma(progress.information()["w"], delta)
    assert float(found.log().mean().exp()) == pytest.approx(sigma, rel=SETTLED)
    assert float((found / sigma).log().square().mean().sqrt()) < 2 * SETTLED


def test_it_goes_on_where_it_stopped() -> None:
    toy, prior = Toy(), Prior(50.0)

    def run(progress: Averages, start: float, steps: int) -> Averages:
        # As the driver does: labels are seeded by step, and the stream begins at the next batch.
        signs = torch.Generator()

        def stream() -> Iterator[list[int]]:
            for number, batch in enumerate(itertools.islice(batches(toy, 9), progress.step, None), progress.step):
                signs.manual_seed(number)
                yield batch

        with ExampleGradients(toy.model, toy.parameters, toy.losses(signs)) as gradients:
            square = toy.squarer(gradients)
            *_, last = itertools.islice(
                iterate(toy.parameters, square, stream(), prior, start, progress, seed=3), steps
            )
        return last

    whole = run(Averages(), 0.1, 27)
    half = run(Averages(), 0.1, 11)
    resumed = run(Averages.restored(half.kept(), torch.device("cpu")), 0.1, 16)
    assert (resumed.step, resumed.losses, resumed.change) == (whole.step, whole.losses, whole.change)
    assert resumed.average["w"].equal(whole.average["w"])
    assert resumed.earlier.keys() == whole.earlier.keys() == {16, 23}
    assert all(value["w"].equal(whole.earlier[step]["w"]) for step, value in resumed.earlier.items())


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


def test_checkpoints_are_powers_of_the_root_of_2() -> None:
    found = [step for step in range(1, 1025) if is_checkpoint(step)]
    assert found == sorted({round(2 ** (k / 2)) for k in range(21)})
    assert all(is_checkpoint(step) and is_checkpoint(2 * step) for step in (16, 32, 64))
