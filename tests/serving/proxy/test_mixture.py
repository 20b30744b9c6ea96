"""Choices among answers, against the definitions written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.generation.scoring import Row
from axolotl_ivon.generation.utilities import AnswerExtractor, exact
from axolotl_ivon.serving.proxy.mixture import Candidate, by_risk, by_score, coarse_entropies


def candidate(text: str, member: int, logprob: float = -1.0, **more: object) -> Candidate:
    return Candidate(text, member, logprob, "stop", 3, **more)  # type: ignore[arg-type]


def test_the_answer_that_most_agree_with_is_chosen() -> None:
    answers = AnswerExtractor(r"(\d+)")
    own = [candidate("so 7", 0), candidate("it is 7", 0, -0.5), candidate("8", 1), candidate("7!", 1)]
    own += [candidate("?", 2), candidate("7", 2)]
    first, second = by_risk(own, 2, exact(answers), answers, DecisionRule(threshold=0.7))
    assert first.text == "it is 7"  # of equal ones the likeliest
    assert second.text == "so 7"
    assert first.ivon["confidence"] == pytest.approx(4 / 6)
    assert first.ivon["members"] == 3
    assert first.ivon["abstain"] is True
    shares = [4 / 6, 1 / 6, 1 / 6]
    total = -sum(p * math.log(p) for p in shares)
    within = 2 / 3 * math.log(2)  # two of three members are of two minds
    assert first.ivon["expected_entropy"] == pytest.approx(within)
    assert first.ivon["mutual_information"] == pytest.approx(total - within)
    assert "abstain" not in by_risk(own, 1, exact(answers), answers, DecisionRule())[0].ivon


def test_fewer_answers_than_asked_for_come_again() -> None:
    own = [candidate("a", 0, ids=(1,)), candidate("a", 1)]
    answers = AnswerExtractor()
    assert [c.text for c in by_risk(own, 3, exact(answers), answers, DecisionRule())] == ["a", "a", "a"]
    assert [c.text for c in by_score(own[:1], [[rows((1,), -1.0)]], 2)] == ["a", "a"]


def rows(ids: Sequence[int], *logprobs: float) -> list[Row]:
    """Return what a member gives the tokens of an answer, and no other token."""
    return [{id: logprob} for id, logprob in zip(ids, logprobs, strict=True)]


def test_the_largest_average_probability_is_chosen() -> None:
    one, two, log = (1, 9), (2, 9), math.log
    own = [candidate("a", 0, ids=one, ended=True), candidate("b", 1, ids=two, ended=True)]
    scores = [
        [rows(one, log(0.9), log(0.5)), rows(one, log(0.1), log(0.5))],  # 0.25 on average
        [rows(two, log(0.4), log(0.8)), rows(two, log(0.4), log(0.8))],  # 0.32
    ]
    best, other = by_score(own, scores, 2, threshold=0.45)
    assert (best.text, other.text) == ("b", "a")
    assert best.ivon["confidence"] == pytest.approx(0.4)  # without the end
    assert other.ivon["confidence"] == pytest.approx(0.5)
    assert [best.ivon["abstain"], other.ivon["abstain"]] == [True, False]
    assert (best.ivon["mutual_information"], other.ivon["mutual_information"] > 0.1) == (pytest.approx(0), True)
    long = by_score([candidate("ab", 0, ids=(1, 2))], [[rows((1, 2), log(0.9), log(0.4))]], 1)
    assert long[0].ivon["confidence"] == pytest.approx(math.sqrt(0.36))


def test_probabilities_that_no_float_holds_are_averaged() -> None:
    own = [candidate("a", 0, ids=(1,)), candidate("b", 0, ids=(2,))]
    # e^−2000 / 2 is more than e^−2001.
    scores = [[rows((1,), -2001.0), rows((1,), -2001.0)], [rows((2,), -2000.0), rows((2,), -3000.0)]]
    assert [chosen.text for chosen in by_score(own, scores, 2)] == ["b", "a"]


@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 6), st.integers(0, 999))
def test_coarse_entropies_are_never_above_those_of_all_tokens(members: int, size: int, top: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=2, size=(members, size))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    told = [{str(t): float(np.log(own[t])) for t in np.argsort(-own)[:top]} for own in p]
    expected, mutual = coarse_entropies(told)

    def entropy(q: np.ndarray) -> float:
        return float(-(q * np.log(q)).sum())

    within = np.mean([entropy(own) for own in p])
    between = entropy(p.mean(0)) - within
    assert -1e-9 <= expected <= within + 1e-9
    assert 0 <= mutual <= between + 1e-9
    if top >= size:
        assert expected == pytest.approx(within, abs=1e-6)
        assert mutual == pytest.approx(between, abs=1e-6)
