"""Predictions of the members of an ensemble that servers hold, as `evaluate` makes them of a model in memory.

Choices are exact: a label's probability takes the log-probabilities of its own tokens alone. Of answers that were
written (the task "generate") the NLL is exact, and accuracy and confidence are those of the likeliest tokens. All
tokens that not every member reports count as one, so entropies and the Brier score are at most the true ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..models.session import ChatReader
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter
from .evaluate import Average, Chunk, Sampling
from .variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from ..metrics.scores import Scores

Rows = list[Mapping[int, float]]  # at each scored position, log-probabilities by token


class Members(Protocol):
    """Members of an ensemble on servers: `generation.scoring.ServedMembers`."""

    posterior: Posterior
    base_model: str
    draws: list[str]
    reader: ChatReader

    def start(self, reporter: Reporter = SILENT) -> None:
        """Ask the servers for their models, and load the tokenizer."""

    def model(self, kind: str) -> str:
        """Return the name under which "base" or "mean" is served."""

    def lacks(self, kind: str) -> str:
        """Return why "base" or "mean" is not served; empty if it is."""

    def labels(self, items: Sequence[EncodedExample], models: Sequence[str]) -> Iterator[list[list[float]]]:
        """Yield for each item, of each model, the log-likelihood of each label."""

    def answers(self, items: Sequence[EncodedExample], models: Sequence[str]) -> Iterator[list[Rows]]:
        """Yield for each item, of each model, the rows of its answer."""


class ServedModel:
    """What `Evaluation` and `Decider` take in place of a model in memory.

    Attributes:
        members: what the servers hold.
        sampling: how many draws are there, and the seed that they were drawn with.
    """

    def __init__(self, members: Members) -> None:
        self.members = members
        self.sampling = Sampling(len(members.draws), int(members.posterior.metadata.get("seed", 0)))

    def evaluate(
        self,
        items: Sequence[EncodedExample],
        variants: Sequence[Variant],
        task: str,
        keep: bool = False,
        reporter: Reporter = SILENT,
    ) -> list[Scores]:
        """Score the predictions of every variant on `items`: see `evaluate.evaluate`.

        Raises:
            IVONError: a variant is not served, or needs other draws; the task is "generate", and a softmax temperature
                or all probabilities are asked for; or as the servers do.
        """
        from ..metrics.scores import Scores

        if any(variant.ratio or variant.tau not in (1, math.inf) for variant in variants):
            raise IVONError(
                f"{param_ref('endpoint')}: the members are drawn already; give {param_ref('tau')} and "
                f"{param_ref('ratio')} to `ivon-post sample`"
            )
        if task == "generate" and (keep or any(variant.temperature != 1 for variant in variants)):
            raise IVONError(
                f"{param_ref('endpoint')}: a softmax temperature takes the probabilities of all tokens, and vLLM "
                "returns the likeliest; ask for choices, or load the adapter here"
            )
        sources = {source: self._models(source) for source in dict.fromkeys(variant.source for variant in variants)}
        models = list(dict.fromkeys(name for names in sources.values() for name in names))
        advance = reporter.begin("evaluating", len(models) * len(items))
        asked: Callable[..., Iterator[list[Any]]] = self.members.labels if task == "choice" else self.members.answers
        scores: list[list[Scores]] = []
        for number, (item, answered) in enumerate(zip(items, asked(items, models), strict=True)):
            by_model = dict(zip(models, answered, strict=True))
            averages = {source: _average(item, [by_model[name] for name in own]) for source, own in sources.items()}
            scores.append([_scores(averages[v.source], item, number, v.temperature) for v in variants])
            advance(len(models))
        return [Scores.concatenate(parts) for parts in zip(*scores, strict=True)]

    def _models(self, variant: Variant) -> Sequence[str]:
        """Return the names of what predicts as a variant; raise IVONError if it is not served."""
        if not variant.base and math.isfinite(variant.tau):
            return self.members.draws
        kind = "base" if variant.base else "mean"
        if reason := self.members.lacks(kind):
            raise IVONError(f"{param_ref('endpoint')}: {reason}")
        return [self.members.model(kind)]


def _average(item: EncodedExample, answered: Sequence[Any]) -> Average:
    """Return the average of what the draws answer, over its labels or over the likeliest tokens at each position."""
    import torch

    if item.candidates is not None:
        drawn = torch.tensor(answered, dtype=torch.float64).softmax(-1)[:, None]
    else:
        drawn = _coarse(item.targets, answered)
    _, count, classes = drawn.shape
    average = Average(drawn.new_zeros(count, classes), drawn.new_zeros(count), drawn.new_zeros(count))
    average.add(torch.arange(count), drawn)
    average.draws = len(drawn)
    return average


def _coarse(targets: Sequence[int], answered: Sequence[Rows]) -> Tensor:
    """Return probabilities (draws, positions, classes): the target's, other tokens' that all draws report, the rest's.

    There are as many classes at each position; those that are not used have the probability 0.
    """
    import torch

    common = [set.intersection(*(set(rows[place]) for rows in answered)) for place in range(len(targets))]
    tokens = [[target, *sorted(shared - {target})] for target, shared in zip(targets, common, strict=True)]
    drawn = torch.zeros(len(answered), len(targets), max(map(len, tokens)) + 1, dtype=torch.float64)
    for draw, rows in enumerate(answered):
        for place, (row, own) in enumerate(zip(rows, tokens, strict=True)):
            drawn[draw, place, : len(own)] = torch.tensor([row[token] for token in own], dtype=torch.float64).exp()
    drawn[..., -1] = (1 - drawn.sum(-1)).clamp_min(0)
    return drawn


def _scores(average: Average, item: EncodedExample, number: int, temperature: float) -> Scores:
    import torch

    choice = item.candidates is not None
    target = torch.tensor(item.targets if choice else [0] * len(item.targets))
    chunk = Chunk([item], torch.full_like(target, number), target)
    scores = average.scores(chunk, temperature, choice)
    if choice:
        return scores
    rest = average.mean[:, -1]  # is no token
    confidence, likeliest = average.mean[:, :-1].max(1)
    correct = (likeliest == 0).double()
    return replace(scores, confidence=confidence, correct=correct, brier=scores.brier - rest.square())
