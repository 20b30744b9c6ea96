"""Utilities for minimum Bayes risk decoding: how good an output is if another one is right."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from ..errors import IVONError, import_optional, param_ref
from .nbest import NBest

# A pattern's first group is the answer (the whole match if it has none); of several matches the last counts.
ANSWERS = {
    "gsm8k": r"####\s*\$?(-?[\d,]*\.?\d+)",
    "boxed": r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",
    "choice": r"(?<![A-Za-z'])([A-HJ-Z])(?![A-Za-z'])",
}


class AnswerExtractor:
    """Finds the answer in a text. Numbers that are equal are the same answer: `1,200`, `1200.0` and `1200`.

    The pattern is a preset of `ANSWERS` or a regular expression. Without one the whole text is the answer, without the
    white space around it.
    """

    def __init__(self, pattern: str | None = None) -> None:
        self.pattern = pattern
        try:
            self._regex = None if pattern is None else re.compile(ANSWERS.get(pattern, pattern), re.MULTILINE)
        except re.error as error:
            raise IVONError(
                f"{param_ref('answer_regex')} {pattern!r}: not a regular expression ({error}); "
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

        Raises IVONError if no output has one, or a reference has none.
        """
        missing = [text for nbest in nbests for text in nbest.texts if self(text) is None]
        total = sum(len(nbest.texts) for nbest in nbests)
        if len(missing) == total:
            raise IVONError(
                f"{param_ref('answer_regex')} {self.pattern!r} matches none of the {total} outputs in "
                f"{nbests[0].source.rpartition(':')[0]}, {_excerpt(missing[0])} for one; choose another"
            )
        for nbest in nbests:
            if nbest.reference is not None and self(nbest.reference) is None:
                raise IVONError(
                    f"{nbest.source}: {param_ref('answer_regex')} {self.pattern!r} does not match the reference "
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


def _pairwise(score: Callable[[str, str], float]) -> Utility:
    """Return the utility that scores each hypothesis against its reference by itself."""
    return lambda hypotheses, references: np.array(
        [score(hypothesis, reference) for hypothesis, reference in zip(hypotheses, references, strict=True)], float
    )


def exact(answers: AnswerExtractor) -> Utility:
    """Return the utility that is 1 where both texts have one answer, and the same."""
    answer = functools.cache(answers)
    return _pairwise(lambda text, reference: answer(text) is not None and answer(text) == answer(reference))


def _sacrebleu(utility: str, **options: Any) -> Utility:
    package = import_optional("sacrebleu.metrics", f"{param_ref('utility')} {utility}", "sacrebleu")
    scorer = getattr(package, utility.upper())(**options)
    return _pairwise(lambda hypothesis, reference: scorer.sentence_score(hypothesis, [reference]).score / 100)


def _rouge() -> Utility:
    package = import_optional("rouge_score.rouge_scorer", f"{param_ref('utility')} rouge", "rouge-score")
    scorer = package.RougeScorer(["rougeL"], use_stemmer=True)
    return _pairwise(lambda hypothesis, reference: scorer.score(reference, hypothesis)["rougeL"].fmeasure)


def _bertscore() -> Utility:
    named = f"{param_ref('utility')} bertscore"
    package = import_optional("bert_score", named, "bert-score")
    try:
        scorer = package.BERTScorer(lang="en")
    except OSError as error:
        raise IVONError(f"{named}: its model cannot be loaded ({str(error).splitlines()[0]})") from None
    return lambda hypotheses, references: scorer.score(list(hypotheses), list(references))[2].double().numpy()


UTILITIES: dict[str, Callable[[AnswerExtractor], Utility]] = {
    "exact": exact,
    # A short sentence may have no 4-grams at all: effective_order leaves those orders out.
    "bleu": lambda answers: _sacrebleu("bleu", effective_order=True),
    "chrf": lambda answers: _sacrebleu("chrf"),
    "rouge": lambda answers: _rouge(),  # F of ROUGE-L, stemmed
    "bertscore": lambda answers: _bertscore(),  # F of BERTScore for English
}
