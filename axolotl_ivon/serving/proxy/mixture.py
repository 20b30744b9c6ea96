"""Whole answers of several members as one: by minimum Bayes risk, or by the members' average probability of each.

A server that gives the likeliest tokens only cannot average distributions token by token, but answers can be weighed.

    mbr       every member gives several answers; the one is chosen that the others agree with most (`generation.mbr`).
    rescore   every member scores every answer y: log p(y) = log 1/M Σ_m Π_t p_m(y_t | y_<t), which is exact. The
              largest is chosen, of those that were drawn. Entropies are of what all members tell: tokens that are among
              the likeliest of each, and all others as one. Coarser than the distributions, they are never above theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...generation.mbr import choose, expected_utility, utility_matrix
from ...generation.uncertainty import by_answer, is_below, measure
from ...generation.utilities import AnswerExtractor, Utility
from ..pieces import Token


@dataclass(frozen=True)
class Candidate:
    """One answer of one member.

    Attributes:
        logprob: of all its tokens, in nats, under that member.
        generated: how many tokens it took.
        ids: its tokens, the one that ended it included; None if the server does not tell.
        names: what each of them is by itself, as far as that is known.
        ended: whether the last of them is a token that ends answers, rather than text.
    """

    text: str
    member: int
    logprob: float
    finish: str
    generated: int
    ids: tuple[int, ...] | None = None
    ended: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """What one member says of an answer's tokens: log-probabilities of each, and of the likeliest in its place."""

    logprobs: tuple[float, ...]
    likeliest: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class Chosen:
    """One of the candidates, and how sure the members are of it, and of its tokens where they were asked."""

    candidate: Candidate
    ivon: dict[str, Any]
    tokens: tuple[Token, ...] = ()


def by_risk(
    candidates: Sequence[Candidate],
    n: int,
    utility: Utility,
    answers: AnswerExtractor,
    *,
    temperature: float = 1.0,
    threshold: float | None = None,
) -> list[Chosen]:
    """Return the n candidates of the largest expected utility, the best first; each answer once, if there are enough.

    Args:
        utility, answers: as for `ivon-post mbr`; `answers` finds in a text what it answers.
        temperature, threshold: of the confidence (`generation.uncertainty`).
    """
    texts, members = [c.text for c in candidates], [c.member for c in candidates]
    expected = expected_utility(utility_matrix(texts, utility), members)
    clusters = by_answer([answers(text) for text in texts])
    left = list(range(len(candidates)))
    chosen: list[int] = []
    while len(chosen) < n:
        fresh = [i for i in left if texts[i] not in {texts[j] for j in chosen}] or left or chosen[:1]
        best = fresh[choose(expected[fresh], [candidates[i].logprob for i in fresh])]
        chosen.append(best)
        left = [i for i in left if i != best]
    found = []
    for index in chosen:
        sure = measure(clusters, members, index, temperature=temperature)
        ivon: dict[str, Any] = {
            "confidence": sure.confidence,
            "expected_entropy": sure.expected_entropy,
            "mutual_information": sure.mutual_information,
            "members": len(set(members)),
        }
        if threshold is not None:
            ivon["abstain"] = is_below(sure.confidence, threshold)
        found.append(Chosen(candidates[index], ivon))
    return found


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of different tokens, the first of each."""
    return list({candidate.ids: candidate for candidate in reversed(candidates)}.values())[::-1]


def by_score(
    candidates: Sequence[Candidate],
    scores: Sequence[Sequence[Scores]],
    n: int,
    *,
    threshold: float | None = None,
) -> list[Chosen]:
    """Return the n candidates of the largest average probability, the best first; the first again if there are fewer.

    Args:
        scores: of each candidate, those of each member.
    """
    totals = [_average([math.fsum(own.logprobs) for own in members]) for members in scores]
    order = sorted(range(len(candidates)), key=lambda i: -totals[i])[:n]
    order += [order[0]] * (n - len(order))
    found = []
    for index in order:
        candidate, members = candidates[index], scores[index]
        length = len(members[0].logprobs)
        length -= candidate.ended and length > 1  # an answer is not surer for having ended
        shown = _average([math.fsum(own.logprobs[:length]) for own in members])
        told = [[own.likeliest[place] for own in members] for place in range(length) if members[0].likeliest]
        entropies = [coarse_entropies(place) for place in told]
        averages = [_average([own.logprobs[place] for own in members]) for place in range(length)]
        tokens = tuple(
            Token(id, name, name, logprob, (), logprob, *both)
            for id, name, logprob, both in zip(candidate.ids or (), candidate.names, averages, entropies, strict=False)
        )
        confidence = math.exp(shown / length)
        ivon: dict[str, Any] = {
            "confidence": confidence,
            "expected_entropy": _mean([expected for expected, _ in entropies]),
            "mutual_information": _mean([mutual for _, mutual in entropies]),
            "members": len(members),
        }
        if threshold is not None:
            ivon["abstain"] = is_below(confidence, threshold)
        found.append(Chosen(candidate, ivon, tokens))
    return found


def coarse_entropies(likeliest: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return expected entropy and mutual information, in nats, of tokens that all members tell of, the rest as one.

    Args:
        likeliest: of each member, log-probabilities by token.
    """
    common = sorted(set.intersection(*map(set, likeliest)))
    shares = np.exp([[own[token] for token in common] for own in likeliest]).reshape(len(likeliest), -1)
    shares = np.concatenate([shares, np.clip(1 - shares.sum(1, keepdims=True), 0, None)], 1)
    expected = float(np.mean([_entropy(own) for own in shares]))
    return expected, max(0.0, _entropy(shares.mean(0)) - expected)


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _average(logprobs: Sequence[float]) -> float:
    """Return the logarithm of the mean of probabilities."""
    top = max(logprobs)
    return top + math.log(math.fsum(math.exp(own - top) for own in logprobs) / len(logprobs))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
