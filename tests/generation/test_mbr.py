"""Minimum Bayes risk decoding against brute force, vote counting, and the utilities' own packages."""

from __future__ import annotations

import json
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
from torchmetrics.functional.classification import binary_auroc

from axolotl_ivon import IVONError
from axolotl_ivon.generation.mbr import (
    Decoded,
    Point,
    auroc,
    choose,
    decode,
    disagreement,
    expected_utility,
    labels,
    sizes,
    utility_matrix,
)
from axolotl_ivon.generation.nbest import NBest, read_nbest
from axolotl_ivon.generation.report import save, scaling
from axolotl_ivon.generation.utilities import UTILITIES, Answers

# rouge-score brings absl, whose handler closes the stderr that pytest captures when axolotl, in a later test of this
# process, sets logging up anew; the true stderr it leaves alone.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

SENTENCES = ["the dog ran fast", "the dog was fast", "a cat", "a cat", "the dog ran to the cat and back"]


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
    answers = Answers("[ABC]")
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
        level: decode([one], UTILITIES["exact"](Answers()), Answers(), level).choices[0].text
        for level in ("sequence", "model")
    }
    assert chosen == {"sequence": "A", "model": "B"}


def test_disagreement_is_between_members() -> None:
    utilities = utility_matrix(list("AABB"), UTILITIES["exact"](Answers()))
    assert disagreement(utilities, [0, 0, 1, 1]) == 1
    assert disagreement(utilities, [0, 1, 0, 1]) == pytest.approx(0.5)
    assert disagreement(utilities, [0, 0, 0, 0]) == pytest.approx(1 - 4 / 12)
    assert disagreement(utilities[:1, :1], [0]) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_that_of_torchmetrics(values: list[tuple[int, bool]]) -> None:
    score, positive = np.array([v / 5 for v, _ in values]), np.array([p for _, p in values])
    found = auroc(score, positive)
    if positive.all() or not positive.any():
        assert found is None
    else:
        expected = binary_auroc(torch.from_numpy(score), torch.from_numpy(positive).long())
        assert found == pytest.approx(float(expected), abs=1e-6)


# --- utilities --------------------------------------------------------------------------------------------------


def by_package(name: str, hypothesis: str, reference: str) -> float:
    if name == "rouge":
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=True).score(reference, hypothesis)["rougeL"].fmeasure
    import sacrebleu

    if name == "bleu":
        return sacrebleu.sentence_bleu(hypothesis, [reference]).score / 100
    return sacrebleu.sentence_chrf(hypothesis, [reference]).score / 100


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge"])
def test_utilities_are_those_of_their_packages(name: str) -> None:
    found = utility_matrix(SENTENCES, UTILITIES[name](Answers()))
    expected = [[by_package(name, a, b) for b in SENTENCES] for a in SENTENCES]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.min() >= 0
    assert found.max() == pytest.approx(1)


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
    matrix = utility_matrix(["a", "b", "cc"], UTILITIES["bertscore"](Answers()))
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
    with pytest.raises(IVONError, match=f"--utility {utility} needs .*pip install {package}"):
        UTILITIES[utility](Answers())


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
    assert Answers(pattern)(text) == answer


def test_a_wrong_or_useless_regex_is_told() -> None:
    with pytest.raises(IVONError, match=r"--answer-regex '\(': not a regular expression .*gsm8k, boxed, choice"):
        Answers("(")
    answers = Answers("gsm8k")
    with pytest.raises(IVONError, match=r"matches none of the 2 outputs in f.jsonl, 'seven' for one"):
        answers.unmatched([nbest(["seven", "eight"])])
    with pytest.raises(IVONError, match=r"f.jsonl:1: .* does not match the reference '7'"):
        answers.unmatched([nbest(["#### 7"], "7")])
    assert answers.unmatched([nbest(["#### 7", "x" * 99], "#### 7")]) == (1, 2, repr("x" * 30 + " … " + "x" * 29))


# --- files ------------------------------------------------------------------------------------------------------


def test_the_curve_takes_the_first_outputs() -> None:
    # 8 outputs say 1, the next 8 too, then 16 say 2 with a better log-probability: right only at n = 32.
    texts = ["#### 1"] * 16 + ["so #### 2"] * 16
    wins = nbest(texts, "#### 2", 8, logprobs=tuple([-2.0] * 16 + [-1.0] * 16))
    loses = nbest(["#### 5"] * 32, "#### 6", 8)
    answers = Answers("gsm8k")
    found = decode([wins, loses], UTILITIES["exact"](answers), answers)
    assert [(point.n, point.accuracy) for point in found.curve] == [(8, 0.0), (16, 0.0), (32, 0.5)]
    assert found.curve[-1].se == pytest.approx((0.25 / 2) ** 0.5)
    assert found.single == pytest.approx(0.25)
    assert (found.choices[0].text, found.choices[0].answer, found.choices[0].member) == ("so #### 2", "2", 2)
    assert found.choices[0].expected_utility == pytest.approx(0.5)
    assert found.auroc == 0  # the one that is wrong has members that agree
    assert found.document()["accuracy"] == 0.5


def test_without_references_there_are_choices_alone(tmp_path: Path) -> None:
    found = decode([nbest(["a", "b", "b"])], UTILITIES["exact"](Answers()), Answers())
    assert (found.choices[0].text, found.curve, found.single, found.auroc) == ("b", [], None, None)
    assert [path.name for path in save({"x": found}, tmp_path / "out")] == ["x.jsonl"]


def test_sizes_double_from_eight() -> None:
    assert [sizes(n) for n in (1, 8, 12, 64)] == [[1], [8], [8, 12], [8, 16, 32, 64]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f.jsonl:1: not JSON"),
        ("{}", "f.jsonl:1: no list of outputs"),
        ('{"outputs": []}', "f.jsonl:1: no list of outputs"),
        ('{"outputs": [{"text": "a"}], "reference": 1}', "f.jsonl:1: no list of outputs"),
        ('{"outputs": ["a"]}', "f.jsonl:1: an output has no text"),
        ('{"outputs": [{"text": "a", "logprob": NaN}]}', "f.jsonl:1: an output has no text, or a member or logprob"),
        ('{"outputs": [{"text": "a", "member": "x"}]}', "f.jsonl:1: an output has no text, or a member"),
        ('{"outputs": [{"text": "a"}]}\n{"outputs": [{"text": "a"}, {"text": "b"}]}', "f.jsonl:2: 2 outputs, but 1"),
        ("", "the file is empty"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(line)
    with pytest.raises(IVONError) as error:
        read_nbest(tmp_path / "f.jsonl")
    assert message in str(error.value)


def test_outputs_without_facts_are_read(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps({"outputs": [{"text": "a"}, {"text": "b", "logprob": None}]}))
    [found] = read_nbest(tmp_path / "f.jsonl")
    assert (found.members, found.logprobs, found.reference) == ((0, 0), (-np.inf, -np.inf), None)


def test_labels(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert labels(["out/mean.jsonl", "10 % pruned=p.jsonl"]) == {"mean": "out/mean.jsonl", "10 % pruned": "p.jsonl"}
    assert labels([str(odd)]) == {"a=b": str(odd)}
    with pytest.raises(IVONError, match=r"the label 'x' is taken by a/x\.jsonl"):
        labels(["a/x.jsonl", "b/x.jsonl"])


def test_the_figure_has_every_point() -> None:
    curves = {
        "mean": [Point(8, 0.5, 0.1, 0.5), Point(16, 0.6, 0.1, 0.6)],
        "posterior": [Point(8, 0.4, 0.1, 0.4), Point(16, 0.7, 0.1, 0.7)],
    }
    axes = scaling(curves).axes[0]
    drawn = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axes.containers}
    assert drawn == {label: pytest.approx([100 * point.accuracy for point in curve]) for label, curve in curves.items()}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16"]
    for container in axes.containers:
        assert container.lines[0].get_xdata() == pytest.approx([8, 16], rel=0.02)


def test_saved_choices_and_pictures(tmp_path: Path) -> None:
    found: Decoded = decode([nbest(["a"] * 8, "a", prompt="\ud800")], UTILITIES["exact"](Answers()), Answers())
    paths = save({"x": found}, tmp_path / "deep" / "out")
    assert [path.name for path in paths] == ["x.jsonl", "accuracy.png", "accuracy.svg"]
    record = json.loads(paths[0].read_text())
    assert record["text"] == record["answer"] == "a"
    assert record["prompt"] == "\ud800"  # half a surrogate pair
    assert record["expected_utility"] == pytest.approx(1)
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[2].read_bytes()
