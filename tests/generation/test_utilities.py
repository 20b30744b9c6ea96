"""Utilities against their own packages, and answers in texts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from absl import logging as absl_logging

from axolotl_ivon import IVONError
from axolotl_ivon.generation.mbr import utility_matrix
from axolotl_ivon.generation.nbest import NBest
from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor

# rouge-score brings absl, whose handler closes the stderr that pytest captures when axolotl, in a later test of this
# process, sets logging up anew; the true stderr it leaves alone.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

SENTENCES = ["the dog ran fast", "the dog was fast", "a cat", "a cat", "the dog ran to the cat and back"]


def nbest(texts: list[str], reference: str | None = None) -> NBest:
    return NBest("?", reference, tuple(texts), (0,) * len(texts), (-1.0,) * len(texts), "f.jsonl:1")


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
    found = utility_matrix(SENTENCES, UTILITIES[name](AnswerExtractor()))
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
