"""Whole answers of several members as one: by minimum Bayes risk, or by the members' average probability of each.

A server that returns only the likeliest tokens cannot average distributions token by token, but answers can be weighed.

    by_risk    Every member gives several answers; the one is chosen that the others agree with most (`generation.mbr`).
    by_score   Every member scores every answer y: log p(y) = log 1/M Σ_m Π_t p_m(y_t | y_<t), which is exact. The
               likeliest of the drawn answers is chosen. Entropies are of the tokens that every member returns, and all
               others as one token. They are coarser than those of the distributions, and never above them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from ...generation.mbr import choose, utility_matrix
from ...generation.scoring import Row
from ...generation.uncertainty import by_answer, measure, split_entropy
from ...generation.utilities import AnswerExtractor, Utility
from ..api.answers import AnswerDelta, Token, certainty

if TYPE_CHECKING:
    from ...decisions.rule import DecisionRule


@dataclass(frozen=True)
class Candidate:
    """One answer of one member."""

    text: str
    member: int
    logprob: float  # of all its tokens, in nats, under that member
    finish: str
    generated: int  # the number of tokens that it took
    ids: tuple[int, ...] | None = None  # its tokens, the one that ended it included; None if they are not returned
    ended: bool = False  # whether the last of them is a token that ends answers, rather than text
    names: tuple[str, ...] = ()  # the text of each token by itself, as far as it is known

    def answer(self, number: int, ivon: dict[str, Any], tokens: tuple[Token, ...] = ()) -> AnswerDelta:
        """Return this candidate as the answer `number`."""
        return AnswerDelta(number, self.text, tokens, self.finish, ivon, self.generated)


def by_risk(
    candidates: Sequence[Candidate], n: int, utility: Utility, answers: AnswerExtractor, rule: DecisionRule
) -> list[AnswerDelta]:
    """Return the n candidates of the largest expected utility, the best first; each text once, if there are enough."""
    texts, members = [c.text for c in candidates], [c.member for c in candidates]
    expected = utility_matrix(texts, utility).mean(1)
    clusters = by_answer([answers(text) for text in texts])
    left = list(range(len(candidates)))
    chosen: list[int] = []
    while len(chosen) < n:
        fresh = [i for i in left if texts[i] not in {texts[j] for j in chosen}] or left or chosen[:1]
        chosen.append(fresh[choose(expected[fresh], [candidates[i].logprob for i in fresh])])
        left = [i for i in left if i != chosen[-1]]
    deltas = []
    for number, index in enumerate(chosen):
        sure = measure(clusters, members, index, rule.temperature)
        measures = sure.confidence, sure.expected_entropy, sure.mutual_information
        deltas.append(candidates[index].answer(number, certainty(*measures, len(set(members)), rule.threshold)))
    return deltas


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of different tokens, the first of each."""
    return list({candidate.ids: candidate for candidate in reversed(candidates)}.values())[::-1]


def by_score(
    candidates: Sequence[Candidate], scores: Sequence[Sequence[Sequence[Row]]], n: int, threshold: float | None = None
) -> list[AnswerDelta]:
    """Return the n candidates of the largest average probability, the best first; the first again if there are fewer.

    `scores` are, of each candidate and under each member, the log-probabilities in the place of each of its tokens.
    """
    # Of each candidate, shape (members, tokens).
    logprobs = [
        np.array([[row[token] for row, token in zip(rows, candidate.ids or (), strict=True)] for rows in members])
        for candidate, members in zip(candidates, scores, strict=True)
    ]
    totals = [float(_average(own.sum(1))) for own in logprobs]
    order = sorted(range(len(candidates)), key=lambda i: -totals[i])[:n]
    order += [order[0]] * (n - len(order))
    deltas = []
    for number, index in enumerate(order):
        candidate, members, own = candidates[index], scores[index], logprobs[index]
        length = own.shape[1]
        length -= candidate.ended and length > 1  # an answer is not surer for having ended
        entropies = [coarse_entropies([rows[place] for rows in members]) for place in range(length)]
        tokens = tuple(
            Token(id, name, name, logprob, (), *both)
            for id, name, logprob, both in zip(
                candidate.ids or (), candidate.names, _average(own).tolist(), entropies, strict=False
            )
        )
        expected, mutual = np.mean(entropies, 0).tolist()
        confidence = math.exp(_average(own[:, :length].sum(1)) / length)
        ivon = certainty(confidence, expected, mutual, len(members), threshold)
        deltas.append(candidate.answer(number, ivon, tokens))
    return deltas


def coarse_entropies(likeliest: Sequence[Mapping[Any, float]]) -> tuple[float, float]:
    """Return expected entropy and mutual information, in nats, of the tokens that all members return, the rest as one.

    `likeliest` are, of each member, log-probabilities by token.
    """
    common = sorted(set.intersection(*map(set, likeliest)))
    shares = np.exp([[logprobs[token] for token in common] for logprobs in likeliest]).reshape(len(likeliest), -1)
    shares = np.concatenate([shares, np.clip(1 - shares.sum(1, keepdims=True), 0, None)], 1)
    _, expected, mutual = split_entropy(shares / len(shares))
    return expected, mutual


def _average(logprobs: np.ndarray) -> np.ndarray:
    """Return the logarithm of the mean of probabilities over the first axis."""
    return logsumexp(logprobs, axis=0) - math.log(len(logprobs))  # type: ignore[no-any-return]
