"""What to predict with: the mean, the mean at its softmax temperature T, or something that costs more than either.

Candidates are ranked on one half of the data and compared in pairs on the other, so that having many of them, or a T
that was fitted, is no advantage. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Choice(Generic[Candidate]):
    """A choice between candidates.

    Attributes:
        recommended: the candidate to predict with.
        scaled: the mean at the T that is best for it; the mean as it is where no T is better.
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
) -> Choice[Candidate]:
    """Recommend the mean, unless its best T is better; and another one if it is better than both.

    Args:
        scaled: the mean at other temperatures.
        others: what costs more than one pass, such as draws.
        cost: ranks candidates, the least first, on the examples that choose; the mean wins a tie.
        outcome: how the first compares with the second on the examples that report, in the words of `judge`.
    """
    at_its_own = min([mean, *scaled], key=cost)
    best = min([mean, at_its_own, *others], key=cost)

    def is_better(candidate: Candidate, other: Candidate) -> bool:
        return candidate != other and outcome(candidate, other) == "better"

    recommended = at_its_own if is_better(at_its_own, mean) else mean
    if is_better(best, mean) and is_better(best, at_its_own):
        recommended = best
    return Choice(recommended, at_its_own, best)
