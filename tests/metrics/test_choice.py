"""The rule by which a prediction is recommended, on simulated losses whose true order is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from axolotl_ivon.metrics.calibration import (
    added_by_a_temperature,
    fit_temperature,
    nll_at_temperatures,
    probable_temperature,
)
from axolotl_ivon.metrics.choice import Choice, choose, cross_validated
from axolotl_ivon.metrics.verdict import judge

COUNT = 200  # examples on each half


def chosen(losses: Tensor, scaled: list[int], others: list[int]) -> Choice[int]:
    """Choose between the columns of losses (2·COUNT, candidates); column 0 is the mean."""

    def outcome(one: int, other: int) -> str:
        gap = losses[COUNT:, one] - losses[COUNT:, other]
        return judge(gap.mean().item(), gap.std().item() / math.sqrt(COUNT), COUNT)

    halves = losses[:COUNT].mean(0), losses[COUNT:].mean(0)
    crossed = 0.0
    for fitted_on, measured_on in (halves, halves[::-1]):
        best = min([0, *scaled], key=fitted_on.tolist().__getitem__)
        crossed += COUNT * (measured_on[best] - measured_on[0]).item()
    return choose(0, scaled, others, halves[0].tolist().__getitem__, outcome, crossed)


def simulated(trial: int, *advantages: float) -> Tensor:
    """Losses of candidates whose expected loss is below the mean's by so much; hard examples are hard for all."""
    generator = torch.Generator().manual_seed(trial)
    hard = torch.randn(2 * COUNT, 1, generator=generator).exp()
    own = 0.3 * torch.randn(2 * COUNT, len(advantages) + 1, generator=generator)
    return hard + own - torch.tensor([0.0, *advantages])


@pytest.mark.parametrize(
    ("advantages", "recommended"),
    [
        ((0.0, 0.0, 0.2, 0.4), 4),  # the better of the draws
        ((0.1, 0.2, 0.0, 0.0), 2),  # the best T of the mean, though draws are no better than the mean
        ((0.0, 0.2, 0.2, 0.0), 2),  # draws that do what T does
        ((-0.2, -0.2, -0.2, -0.2), 0),
    ],
)
def test_a_planted_difference_is_recommended(advantages: tuple[float, ...], recommended: int) -> None:
    choices = [chosen(simulated(trial, *advantages), [1, 2], [3, 4]) for trial in range(100)]
    assert sum(choice.recommended == recommended for choice in choices) >= 95


def test_noise_is_hardly_ever_recommended() -> None:
    """Beyond two standard errors to one side lies Φ(−2) = 2.3 %."""
    trials = 2000
    choices = [chosen(simulated(trial, *[0.0] * 9), [1, 2, 3], [4, 5, 6, 7, 8, 9]) for trial in range(trials)]
    times = sum(choice.recommended in range(4, 10) for choice in choices)
    assert times <= trials * 0.023 + 3 * math.sqrt(trials * 0.023)
    assert sum(choice.best != 0 for choice in choices) > 0.8 * trials, (
        "by chance one of nine is first where they choose"
    )


def test_the_first_wins_a_tie_and_another_must_beat_the_mean_at_its_temperature_too() -> None:
    losses = torch.zeros(2 * COUNT, 3)
    assert chosen(losses, [1], [2]) == Choice(0, 0, 0)
    order = {(2, 0): "better", (2, 1): "within noise"}
    cost = [3.0, 2.0, 1.0].__getitem__
    assert choose(0, [1], [2], cost, lambda *pair: order[pair], 0.0) == Choice(0, 1, 2)
    assert choose(0, [1], [2], cost, lambda *pair: order[pair], -1.1) == Choice(1, 1, 2)
    # By luck the half that chooses has no T, though one helps.
    assert choose(0, [0, 1], [], [1.0, 2.0].__getitem__, lambda *pair: order[pair], -1.1) == Choice(1, 0, 0)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 0.7])
def test_a_temperature_is_taken_where_it_pays_in_expectation(temperature: float) -> None:
    """Of a model whose logits are too large by a factor, held against its NLL on many other examples.

    A calibrated model loses less than half of what a fitted T costs it; of another's gain by its own T most is had.
    """
    generator = torch.Generator().manual_seed(0)

    def sampled(count: int) -> tuple[Tensor, Tensor]:
        logits = 1.5 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
        target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        return (logits * temperature).softmax(-1), target

    def nll(of: tuple[Tensor, Tensor], at: float) -> float:
        return torch.nn.functional.cross_entropy(of[0].log() / at, of[1]).item()

    many, found, always = sampled(20_000), [], []
    for _ in range(100):
        data = sampled(200)

        losses = nll_at_temperatures(data[0].log(), data[1][:, None]).squeeze(1)
        own = probable_temperature(*data)
        crossed = added_by_a_temperature(losses.numpy())
        choice = choose(1.0, [own], [], lambda at, data=data: nll(data, at), lambda *_: "within noise", crossed)
        found.append(nll(many, choice.recommended))
        always.append(nll(many, fit_temperature(*data)))
    added, costs = (sum(values) / len(values) - nll(many, 1.0) for values in (found, always))
    if temperature == 1:
        assert 0 < 2 * added < costs
    else:
        assert added < 0.6 * (nll(many, temperature) - nll(many, 1.0)) < 0


@given(
    losses=arrays(float, (7, 4), elements=st.integers(-9, 9).map(float)),
    penalties=arrays(float, 4, elements=st.integers(0, 9).map(float)),
    column=st.integers(0, 3),
)
def test_each_example_has_what_is_best_for_the_others(losses: np.ndarray, penalties: np.ndarray, column: int) -> None:
    added = []
    for number, own in enumerate(losses):
        others = [*losses[:number].tolist(), *losses[number + 1 :].tolist()]
        costs = [sum(values) + more for values, more in zip(zip(*others, strict=True), penalties, strict=True)]
        added.append(own[costs.index(min(costs))] - own[column])
    assert cross_validated(losses, penalties, column) == pytest.approx(sum(added))
