"""Minimum Bayes risk decoding against brute force and vote counting; utilities against their own packages; answers."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from absl import logging as absl_logging
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.generation.mbr import (
    MBRResult,
    MBRSettings,
    choose,
    disagreement,
    expected_utility,
    label_files,
    mbr,
    sizes,
    utility_matrix,
)
from axolotl_ivon.generation.nbest import NBest
from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor, exact
from axolotl_ivon.plots.scaling import save

# rouge-score brings absl, whose handler closes the stderr that pytest captures when axolotl, in a later test of this
# process, sets logging up anew; the true stderr it leaves alone.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def nbest(texts: list[str], reference: str | None = None, per_model: int = 1, **more: Any) -> NBest:
    values = {
        "members": tuple(i // per_model for i in range(len(texts))),
        "logprobs": tuple(-1.0 - i for i in range(len(texts))),
        **more,
    }
    return NBest("?", reference, tuple(texts), source="f.jsonl:1", **values)


def decode(*nbests: NBest, pattern: str | None = None, **settings: Any) -> MBRResult:
    answers = AnswerExtractor(pattern)
    return mbr(nbests, MBRSettings(exact(answers), answers, **settings))


# --- choosing ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("ABC-"), st.integers(-3, 0), st.integers(0, 2)), min_size=1, max_size=12),
)
def test_exact_is_a_majority_vote_and_logprob_breaks_ties(outputs: list[tuple[str, int, int]]) -> None:
    utilities = utility_matrix([answer for answer, _, _ in outputs], exact(AnswerExtractor("[ABC]")))
    chosen = choose(expected_utility(utilities, [m for _, _, m in outputs]), [logprob for _, logprob, _ in outputs])
    votes = Counter(answer for answer, _, _ in outputs if answer != "-")
    most = max(votes.values(), default=0)
    tied = [output for output in outputs if votes[output[0]] == most]
    assert outputs[chosen] in tied
    assert outputs[chosen][1] == max(logprob for _, logprob, _ in tied)


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


@pytest.mark.parametrize(("level", "chosen"), [("sequence", "A"), ("model", "B")])
def test_levels_differ_where_members_give_unequal_numbers(level: str, chosen: str) -> None:
    # Three of one member say A; one each of two others B: the pool prefers A, the members B.
    assert decode(nbest(list("AAABB"), members=(0, 0, 0, 1, 2)), level=level).choices[0].text == chosen


def test_disagreement_is_between_members() -> None:
    utilities = utility_matrix(list("AABB"), exact(AnswerExtractor()))
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
    result = decode(wins, loses, pattern="gsm8k")
    assert [(point.n, point.accuracy) for point in result.curve] == [(8, 0.0), (16, 0.0), (32, 0.5)]
    assert result.curve[-1].se == pytest.approx((0.25 / 2) ** 0.5)
    assert result.single == pytest.approx(0.25)
    choice = result.choices[0]
    assert (choice.text, choice.answer, choice.member) == ("so #### 2", "2", 2)
    assert choice.expected_utility == pytest.approx(0.5)
    assert result.auroc == 0  # the one that is wrong has members that agree
    assert result.document()["accuracy"] == 0.5


def test_without_references_there_are_choices_alone(tmp_path: Path) -> None:
    result = decode(nbest(["a", "b", "b"]))
    assert (result.choices[0].text, result.curve, result.single, result.auroc) == ("b", [], None, None)
    assert [path.name for path in save({"x": result}, tmp_path / "out")] == ["x.jsonl"]


def test_sizes_double_from_eight() -> None:
    assert [sizes(n) for n in (1, 8, 12, 64)] == [[1], [8], [8, 12], [8, 16, 32, 64]]


def test_labels(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert label_files(["out/mean.jsonl", "10 % cut=p.jsonl"]) == {"mean": "out/mean.jsonl", "10 % cut": "p.jsonl"}
    assert label_files([str(odd)]) == {"a=b": str(odd)}
    with pytest.raises(IVONError, match=r"the label 'x' is taken by a/x\.jsonl"):
        label_files(["a/x.jsonl", "b/x.jsonl"])


# --- utilities --------------------------------------------------------------------------------------------------

SENTENCES = ["the dog ran fast", "the dog was fast", "a cat", "a cat", "the dog ran to the cat and back"]


def by_package(name: str, hypothesis: str, reference: str) -> float:
    if name == "rouge":
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=True).score(reference, hypothesis)["rougeL"].fmeasure
    import sacrebleu

    return getattr(sacrebleu, f"sentence_{name}")(hypothesis, [reference]).score / 100


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge"])
def test_utilities_are_those_of_their_packages(name: str) -> None:
    matrix = utility_matrix(SENTENCES, UTILITIES[name](AnswerExtractor()))
    expected = [[by_package(name, a, b) for b in SENTENCES] for a in SENTENCES]
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
    assert matrix.min() >= 0
    assert matrix.max() == pytest.approx(1)


def test_equal_texts_are_compared_once() -> None:
    asked: list[tuple[str, str]] = []

    def utility(hypotheses: Any, references: Any) -> np.ndarray:
        asked.extend(zip(hypotheses, references, strict=True))
        return np.array([ord(h) - ord(r) for h, r in zip(hypotheses, references, strict=True)], float)

    matrix = utility_matrix(list("abab"), utility)
    assert len(asked) == len(set(asked)) == 4
    assert matrix.tolist() == [[ord(h) - ord(r) for r in "abab"] for h in "abab"]


def test_bertscore_asks_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scorer:
        def __init__(self, lang: str) -> None:
            assert lang == "en"

        def score(self, hypotheses: list[str], references: list[str]) -> tuple[torch.Tensor, ...]:
            f = [float(len(h) == len(r)) for h, r in zip(hypotheses, references, strict=True)]
            return torch.zeros(len(f)), torch.ones(len(f)), torch.tensor(f)

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=Scorer))
    matrix = utility_matrix(["a", "b", "cc"], UTILITIES["bertscore"](AnswerExtractor()))
    assert matrix.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("utility", "module", "package"),
    [
        ("bleu", "sacrebleu.metrics", "sacrebleu"),
        ("chrf", "sacrebleu.metrics", "sacrebleu"),
        ("rouge", "rouge_score.rouge_scorer", "rouge-score"),
        ("bertscore", "bert_score", "bert-score"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, utility: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IVONError, match=f"utility {utility} needs .*pip install {package}"):
        UTILITIES[utility](AnswerExtractor())


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (None, "  yes\n", "yes"),
        (None, "1,200.0", "1200"),
        ("gsm8k", "2 + 3 = <<2+3=5>>5\n#### 5", "5"),
        ("gsm8k", "#### 5 no\n#### $1,200.50.", "1200.5"),
        ("gsm8k", "#### -3", "-3"),
        ("gsm8k", "####1200", "1200"),
        ("gsm8k", "the answer is 5", None),
        ("boxed", r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{a^{b_{c}}}", "a^{b_{c}}"),
        ("boxed", r"\boxed{7", None),
        ("choice", "The answer is (B).", "B"),
        ("choice", "A or C? C", "C"),
        ("choice", "I think D: I'm sure", "D"),
        ("choice", "None", None),
        (None, "1" * 30 + "2", "1" * 30 + "2"),
        (r"= (\d+)", "1 + 2 = 3 = 3.0", "3"),
        (r"\d+", "1 and 22", "22"),
        (r"a(x)?", "ax a", "x"),
        (r"^end (\w+)$", "end one\nend two\n", "two"),
    ],
)
def test_answers(pattern: str | None, text: str, answer: str | None) -> None:
    assert AnswerExtractor(pattern)(text) == answer


def test_a_wrong_or_useless_regex_is_told() -> None:
    with pytest.raises(IVONError, match=r"answer_regex '\(': not a regular expression .*gsm8k, boxed, choice"):
        AnswerExtractor("(")
    answers = AnswerExtractor("gsm8k")
    with pytest.raises(IVONError, match=r"matches none of the 2 outputs in f.jsonl, 'seven' for one"):
        answers.unmatched([nbest(["seven", "eight"])])
    with pytest.raises(IVONError, match=r"f.jsonl:1: .* does not match the reference '7'"):
        answers.unmatched([nbest(["#### 7"], "7")])
    assert answers.unmatched([nbest(["#### 7", "x" * 99], "#### 7")]) == (1, 2, repr("x" * 30 + " … " + "x" * 29))
