"""The diagonal Fisher information at the mean, by one pass: the diagonal Laplace approximation.

h = 1/M·Σ_n E[(∇ Σ_t ℓ_nt)²] over the examples n and the M losses of all of them (the labels: tokens of a chat, or
one of a classifier), with labels as the model would draw them. Given a text, the drawn labels of its tokens are
independent and their gradients have mean 0, so that is the information of one loss, as B·ĝ² of training is
(`IVONLoRA`). With the labels of the data it is the empirical Fisher, which is small where the adapter has learned its
data by heart.

A label that is drawn is nearly always the likeliest where the model is sure, and few examples would make up all of h.
What a label y does is to give the logits the gradient p − e_y, of mean 0 and covariance diag(p) − p·pᵀ; any vector of
this covariance has the same squares on average (as in curvature propagation, arXiv 1206.6464). Here it is
√p∘s − p·(√p·s) with random signs s, whose size hardly varies.

σ² = 1/(λ·(h + δ)) is the diagonal Laplace approximation (MacKay 1992) with the Fisher information in place of the
Hessian: Laplace-LoRA's (arXiv 2308.13111) generalized Gauss-Newton diagonal, which it equals for these likelihoods.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..data.encode import EncodedExample
from ..models.batching import Batches, Halving
from ..models.gradients import ExampleGradients, PositionLoss, example_losses, negative_log_likelihood
from ..noise import generator as numpy_generator
from ..reporter import SILENT, Reporter
from .precision import choose_ess, first_prior, fitted
from .problem import FitProblem, FittedSigma
from .state import Snapshot

_T = TypeVar("_T")


def residuals(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return random gradients of losses by their logits [m, classes], of mean 0 and covariance diag(p) − p·pᵀ each."""
    p = logits.detach().softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=p.dtype).mul_(2).sub_(1)
    moved = signs.mul_(p.sqrt())
    return moved - p * moved.sum(-1, keepdim=True)


def residual_loss(generator: torch.Generator) -> PositionLoss:
    """Return what has random `residuals` as its gradients, in place of a loss of labels that the model would draw."""
    return lambda logits, targets: (logits * residuals(logits, generator)).sum(-1)


class Squares(NamedTuple):
    """Σ over examples of their squared gradients, by parameter, and how many losses they are of."""

    total: dict[str, Tensor]
    losses: int

    def add(self, other: Squares) -> Squares:
        """Return the sum of both."""
        total = dict(self.total)
        for name, value in other.total.items():
            total[name] = total[name] + value if name in total else value
        return Squares(total, self.losses + other.losses)

    def information(self) -> dict[str, Tensor]:
        """Return h by parameter."""
        return {name: value / self.losses for name, value in self.total.items()}


def squarer(
    gradients: ExampleGradients[_T], count: Callable[[_T], int], reporter: Reporter = SILENT
) -> Callable[[Sequence[_T]], Squares]:
    """Return a function that adds up the squared gradients of examples, of fewer at once when the memory runs out.

    `count` gives the number of losses that an example's loss is the sum of.
    """
    halving = Halving(reporter=reporter)

    def square_part(examples: Sequence[_T]) -> Squares:
        total: dict[str, Tensor] = {}

        def consume(name: str, first: int, some: Tensor) -> None:
            square = some.square_().sum(0)
            total[name] = total[name].add_(square) if name in total else square

        gradients(examples, consume)
        return Squares(total, sum(map(count, examples)))

    def square(examples: Sequence[_T]) -> Squares:
        return functools.reduce(Squares.add, (more for _, more in halving.over(examples, square_part)))

    return square


@contextlib.contextmanager
def squaring(problem: FitProblem) -> Iterator[Callable[[int, Sequence[EncodedExample]], Squares]]:
    """Give the function that squares the gradients of a batch, whose number seeds the labels that are drawn."""
    session, items = problem.session, problem.items
    generator = None if problem.settings.empirical else torch.Generator(session.device)
    loss = negative_log_likelihood if generator is None else residual_loss(generator)
    losses = functools.partial(example_losses, session.model, loss=loss)
    with ExampleGradients(session.model, problem.parameters, losses, problem.reporter) as gradients:
        if len(items) > 1:  # before labels are seeded, so that the trial takes none of them
            by_length = sorted(items, key=lambda item: len(item.ids))
            gradients.try_on([by_length[0], by_length[len(by_length) // 2]])
        add_up = squarer(gradients, lambda item: len(item.positions), problem.reporter)

        def square(number: int, batch: Sequence[EncodedExample]) -> Squares:
            if generator is not None:
                seed = numpy_generator("labels of fit", problem.settings.seed, number).integers(2**62)
                generator.manual_seed(int(seed))
            return add_up(batch)

        yield square


def fit(problem: FitProblem) -> FittedSigma:
    """Return σ by the information at the mean, with validation data at the λ that they choose.

    An interrupted pass continues after the batches that are done.
    """
    settings, device = problem.settings, problem.session.device
    batches = Batches(problem.items, settings.batch_size, device.type, problem.session.classes).once()
    done, sums = 0, Squares({}, 0)
    if kept := problem.state.read():
        total = {name: value.to(device) for name, value in kept.tensors.items()}
        done, sums = kept.values["batches"], Squares(total, kept.values["losses"])
    advance = problem.reporter.begin("Fisher information", len(problem.items))
    advance(sum(map(len, batches[:done])))

    def snapshot() -> Snapshot:
        return Snapshot(sums.total, {"losses": sums.losses, "batches": done})

    with squaring(problem) as square, problem.state.kept(snapshot):
        for batch in batches[done:]:
            done, sums = done + 1, sums.add(square(done, batch))
            advance(len(batch))
            problem.state.keep(snapshot)
    if settings.validation:
        problem.state.write(snapshot())
    information = sums.information()
    return fitted(problem, information, choose_ess(problem, information, first_prior(problem)))
