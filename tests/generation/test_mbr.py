"""Minimum Bayes risk decoding against brute force, vote counting, and the utilities' own packages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.generation.mbr import (
    choose,
    disagreement,
    expected_utility,
    labels,
    mbr,
    sizes,
    utility_matrix,
)
from axolotl_ivon.generation.nbest import NBest
from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor
from axolotl_ivon.plots.scaling import save


def nbest(texts: list[str], reference: str | None = None, per_model: int = 1, **more: Any) -> NBest:
    values = {
        "members": tuple(i // per_model for i in range(len(texts))),
        "logprobs": tuple(-1.0 - i for i in range(len(texts))),
        **more,
    }
    return NBest(values.pop("prompt", "?"), reference, tuple(texts), source="f.jsonl:1", **values)


# --- choosing ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("ABC-"), st.integers(-3, 0), st.integers(0, 2)), min_size=1, max_size=12),
)
def test_exact_is_a_majority_vote_and_logprob_breaks_ties(outputs: list[tuple[str, int, int]]) -> None:
    answers = AnswerExtractor("[ABC]")
    texts = [answer for answer, _, _ in outputs]
    utilities = utility_matrix(texts, UTILITIES["exact"](answers))
    found = choose(expected_utility(utilities, [m for _, _, m in outputs]), [logprob for _, logprob, _ in outputs])
    votes = Counter(text for text in texts if text != "-")
    most = max(votes.values(), default=0)
    tied = [output for output in outputs if votes[output[0]] == most]
    assert outputs[found] in tied
    assert outputs[found][1] == max(logprob for _, logprob, _ in tied)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_expected_utilities_are_the_averages_they_say(members: list[int], seed: int) -> None:
    n = len(members)
    utilities = np.random.default_rng(seed).random((n, n))
    pooled = [np.mean([utilities[i, j] for j in range(n)]) for i in range(n)]
    by_member = [
        np.mean([np.mean([utilities[i, j] for j in range(n) if members[j] == m]) for m in set(members)])
        for i in range(n)
    ]
    np.testing.assert_allclose(expected_utility(utilities, members, "sequence"), pooled)
    np.testing.assert_allclose(expected_utility(utilities, members, "model"), by_member)
    if len(set(Counter(members).values())) == 1:
        np.testing.assert_allclose(pooled, by_member)


def test_levels_differ_where_members_give_unequal_numbers() -> None:
    # Three of one member say A; one each of two others B: the pool prefers A, the members B.
    one = nbest(list("AAABB"), members=(0, 0, 0, 1, 2))
    chosen = {
        level: mbr([one], UTILITIES["exact"](AnswerExtractor()), AnswerExtractor(), level).choices[0].text
        for level in ("sequence", "model")
    }
    assert chosen == {"sequence": "A", "model": "B"}


def test_disagreement_is_between_members() -> None:
    utilities = utility_matrix(list("AABB"), UTILITIES["exact"](AnswerExtractor()))
    assert disagreement(utilities, [0, 0, 1, 1]) == 1
    assert disagreement(utilities, [0, 1, 0, 1]) == pytest.approx(0.5)
    assert disagreement(utilities, [0, 0, 0, 0]) == pytest.approx(1 - 4 / 12)
    assert disagreement(utilities[:1, :1], [0]) == 0


# --- decoding ---------------------------------------------------------------------------------------------------


def test_the_curve_takes_the_first_outputs() -> None:
    # 8 outputs say 1, the next 8 too, then 16 say 2 with a better log-probability: right only at n = 32.
    texts = ["#### 1"] * 16 + ["so #### 2"] * 16
    wins = nbest(texts, "#### 2", 8, logprobs=tuple([-2.0] * 16 + [-1.0] * 16))
    loses = nbest(["#### 5"] * 32, "#### 6", 8)
    answers = AnswerExtractor("gsm8k")
    found = mbr([wins, loses], UTILITIES["exact"](answers), answers)
    assert [(point.n, point.accuracy) for point in found.curve] == [(8, 0.0), (16, 0.0), (32, 0.5)]
    assert found.curve[-1].se == pytest.approx((0.25 / 2) ** 0.5)
    assert found.single == pytest.approx(0.25)
    assert (found.choices[0].text, found.choices[0].answer, found.choices[0].member) == ("so #### 2", "2", 2)
    assert found.choices[0].expected_utility == pytest.approx(0.5)
    assert found.auroc == 0  # the one that is wrong has members that agree
    assert found.document()["accuracy"] == 0.5


def test_without_references_there_are_choices_alone(tmp_path: Path) -> None:
    found = mbr([nbest(["a", "b", "b"])], UTILITIES["exact"](AnswerExtractor()), AnswerExtractor())
    assert (found.choices[0].text, found.curve, found.single, found.auroc) == ("b", [], None, None)
    assert [path.name for path in save({"x": found}, tmp_path / "out")] == ["x.jsonl"]


def test_sizes_double_from_eight() -> None:
    assert [sizes(n) for n in (1, 8, 12, 64)] == [[1], [8], [8, 12], [8, 16, 32, 64]]


def test_labels(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert labels(["out/mean.jsonl", "10 % pruned=p.jsonl"]) == {"mean": "out/mean.jsonl", "10 % pruned": "p.jsonl"}
    assert labels([str(odd)]) == {"a=b": str(odd)}
    with pytest.raises(IVONError, match=r"the label 'x' is taken by a/x\.jsonl"):
        labels(["a/x.jsonl", "b/x.jsonl"])
