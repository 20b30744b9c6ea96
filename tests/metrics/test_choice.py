"""The rule by which a prediction is recommended, on simulated losses whose true order is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from axolotl_ivon.metrics.choice import Choice, choose
from axolotl_ivon.metrics.verdict import judge

COUNT = 200  # examples on each half


def chosen(losses: Tensor, scaled: list[int], others: list[int]) -> Choice[int]:
    """Choose between the columns of losses (2·COUNT, candidates); column 0 is the mean."""

    def outcome(one: int, other: int) -> str:
        gap = losses[COUNT:, one] - losses[COUNT:, other]
        return judge(gap.mean().item(), gap.std().item() / math.sqrt(COUNT), COUNT)

    return choose(0, scaled, others, lambda column: losses[:COUNT, column].mean().item(), outcome)


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
    """Beyond two standard errors to one side lies Φ(−2) = 2.3 %: once for T, and less often for the draws."""
    trials = 2000
    choices = [chosen(simulated(trial, *[0.0] * 9), [1, 2, 3], [4, 5, 6, 7, 8, 9]) for trial in range(trials)]
    for candidates, rate in (((1, 2, 3), 0.023), (range(4, 10), 0.023)):
        times = sum(choice.recommended in candidates for choice in choices)
        assert times <= trials * rate + 3 * math.sqrt(trials * rate)
    assert sum(choice.best != 0 for choice in choices) > 0.8 * trials, (
        "by chance one of nine is first where they choose"
    )


def test_the_first_wins_a_tie_and_another_must_beat_the_mean_at_its_temperature_too() -> None:
    losses = torch.zeros(2 * COUNT, 3)
    assert chosen(losses, [1], [2]) == Choice(0, 0, 0)
    order = {(2, 0): "better", (2, 1): "within noise", (1, 0): "within noise"}
    cost = [3.0, 2.0, 1.0].__getitem__
    assert choose(0, [1], [2], cost, lambda *pair: order[pair]) == Choice(0, 1, 2)
