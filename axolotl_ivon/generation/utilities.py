"""Utilities for minimum Bayes risk decoding: how good an output is if another one is right."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from ..errors import IVONError, parameter
from .nbest import NBest

# A pattern's first group is the answer (the whole match if it has none); of several matches the last counts.
ANSWERS = {
    "gsm8k": r"####\s*\$?(-?[\d,]*\.?\d+)",
    "boxed": r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",
    "choice": r"(?<![A-Za-z'])([A-HJ-Z])(?![A-Za-z'])",
}


class Answers:
    """Pulls the answer out of a text: `ANSWERS` has presets, anything else is a regular expression.

    Without a pattern the whole text, without the white space around it, is the answer. Numbers that are equal are
    the same answer: `1,200`, `1200.0` and `1200`.

    Raises:
        IVONError: the pattern is no regular expression.
    """

    def __init__(self, pattern: str | None = None) -> None:
        self.pattern = pattern
        try:
            self._regex = None if pattern is None else re.compile(ANSWERS.get(pattern, pattern), re.MULTILINE)
        except re.error as error:
            raise IVONError(
                f"{parameter('answer_regex')} {pattern!r}: not a regular expression ({error}); "
                f"presets are {', '.join(ANSWERS)}"
            ) from None
        self._group = 1 if self._regex is not None and self._regex.groups else 0

    def __call__(self, text: str) -> str | None:
        """Return the answer, or None if there is none."""
        if self._regex is None:
            return _canonical(text)
        matches = [match for match in self._regex.finditer(text) if match[self._group] is not None]
        return _canonical(matches[-1][self._group]) if matches else None

    def unmatched(self, nbests: Sequence[NBest]) -> tuple[int, int, str]:
        """Return how many outputs have no answer, of how many, and the first that has none.

        Raises:
            IVONError: no output has one, or a reference has none.
        """
        missing = [text for nbest in nbests for text in nbest.texts if self(text) is None]
        total = sum(len(nbest.texts) for nbest in nbests)
        if len(missing) == total:
            raise IVONError(
                f"{parameter('answer_regex')} {self.pattern!r} matches none of the {total} outputs in "
                f"{nbests[0].source.rpartition(':')[0]}, {_excerpt(missing[0])} for one; choose another"
            )
        for nbest in nbests:
            if nbest.reference is not None and self(nbest.reference) is None:
                raise IVONError(
                    f"{nbest.source}: {parameter('answer_regex')} {self.pattern!r} does not match the reference "
                    f"{_excerpt(nbest.reference)}; choose another"
                )
        return len(missing), total, _excerpt(missing[0]) if missing else ""


def _canonical(text: str) -> str:
    text = text.strip()
    if len(text) > 28:  # digits that Decimal keeps
        return text
    try:
        number = Decimal(text.replace(",", "")).normalize()
    except InvalidOperation:
        return text
    return f"{number:f}" if number.is_finite() and abs(number.adjusted()) < 50 else text


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:30]} … {text[-29:]}")


# Maps hypotheses and references, lists of one length, to utilities between 0 and 1, float64 of that length.
Utility = Callable[[Sequence[str], Sequence[str]], "np.ndarray"]


def exact(answers: Answers) -> Utility:
    def equal(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
        held = {text: answers(text) for text in {*hypotheses, *references}}
        pairs = zip(hypotheses, references, strict=True)
        return np.array([held[h] is not None and held[h] == held[r] for h, r in pairs], float)

    return equal


def _sacrebleu(metric: str) -> Callable[[Answers], Utility]:
    def make(_: Answers) -> Utility:
        module = _import("sacrebleu.metrics", "sacrebleu", metric.lower())
        # A short sentence may have no 4-grams at all: effective_order leaves those orders out.
        scorer = module.BLEU(effective_order=True) if metric == "BLEU" else module.CHRF()

        def score(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
            pairs = zip(hypotheses, references, strict=True)
            return np.array([scorer.sentence_score(h, [r]).score / 100 for h, r in pairs])

        return score

    return make


def _rouge(_: Answers) -> Utility:
    scorer = _import("rouge_score.rouge_scorer", "rouge-score", "rouge").RougeScorer(["rougeL"], use_stemmer=True)

    def score(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
        pairs = zip(hypotheses, references, strict=True)
        return np.array([scorer.score(r, h)["rougeL"].fmeasure for h, r in pairs])

    return score


def _bertscore(_: Answers) -> Utility:
    module = _import("bert_score", "bert-score", "bertscore")
    try:
        scorer = module.BERTScorer(lang="en")
    except OSError as error:
        raise IVONError(
            f"{parameter('utility')} bertscore: its model cannot be loaded ({str(error).splitlines()[0]})"
        ) from None
    return lambda hypotheses, references: scorer.score(list(hypotheses), list(references))[2].double().numpy()


# exact: the answers are equal. bleu, chrf: of a sentence, by sacrebleu. rouge: F of ROUGE-L, stemmed, by rouge-score.
# bertscore: F of BERTScore for English.
UTILITIES: dict[str, Callable[[Answers], Utility]] = {
    "exact": exact,
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    "rouge": _rouge,
    "bertscore": _bertscore,
}


def _import(module: str, package: str, utility: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise IVONError(
            f"{parameter('utility')} {utility} needs the package {package}: pip install {package}"
        ) from None
