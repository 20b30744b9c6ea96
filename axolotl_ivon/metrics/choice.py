"""What to predict with: the mean, the mean at its softmax temperature T, or something that costs more than either.

Candidates are ranked on one half of the data and compared in pairs on the other, so that having many of them is no
advantage. Draws and pruned means have to be better beyond noise. T costs nothing at prediction: it is taken where
it helps, by cross-validation. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from .verdict import UNSEEN

SPLITS = 10  # a single one is a matter of luck
Candidate = TypeVar("Candidate")


def cross_validated(examples: int, seed: int, loss: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Return the loss on one half of what is fitted to the other, averaged over both halves of some random splits.

    Args:
        examples: how many there are.
        loss: of what is fitted to the examples with the first numbers, on those with the second.
    """
    rng, losses = np.random.default_rng(seed), []
    for _ in range(SPLITS):
        order = rng.permutation(examples)
        one, other = order[: examples // 2], order[examples // 2 :]
        losses += [loss(one, other), loss(other, one)]
    return float(np.mean(losses))


@dataclass(frozen=True)
class Choice(Generic[Candidate]):
    """A choice between candidates.

    Attributes:
        recommended: the candidate to predict with.
        scaled: the mean at the T that is best for it where candidates are ranked; the mean as it is where none is.
        best: what ranks first, whether or not that is more than noise.
    """

    recommended: Candidate
    scaled: Candidate
    best: Candidate


def choose(
    mean: Candidate,
    scaled: Iterable[Candidate],
    others: Iterable[Candidate],
    cost: Callable[[Candidate], Any],
    outcome: Callable[[Candidate, Candidate], str],
    crossed: float,
) -> Choice[Candidate]:
    """Recommend the mean, at its best T if that helps; and another one if it is better than both.

    Args:
        scaled: the mean at other temperatures.
        others: what costs more than one pass, such as draws.
        cost: ranks candidates, the least first, on the examples that choose; the mean wins a tie.
        outcome: how the first compares with the second on the examples that report, in the words of `judge`.
        crossed: what a T adds to the mean's loss, by cross-validation. A T has to take away enough for a table to show.
    """
    scaled = list(scaled)
    at_its_own = min([mean, *scaled], key=cost)
    best = min([mean, at_its_own, *others], key=cost)

    def is_better(candidate: Candidate, other: Candidate) -> bool:
        return candidate != other and outcome(candidate, other) == "better"

    recommended = min((one for one in scaled if one != mean), key=cost, default=mean) if crossed <= -UNSEEN else mean
    if is_better(best, mean) and is_better(best, at_its_own):
        recommended = best
    return Choice(recommended, at_its_own, best)
