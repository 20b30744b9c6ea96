"""Minimum Bayes risk decoding over the outputs of several draws (Daheim et al., ICLR 2025, arXiv 2503.05318).

Of a prompt's outputs y_1 … y_n the one with the largest expected utility is chosen,

    argmax_i 1/n Σ_j u(y_i, y_j),

where u(y_i, y_j) tells how good y_i is if y_j is right: the outputs of all members are in one pool (equation 9 there).
With the utility "answers are equal" this is a vote.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IVONError
from ..metrics.auroc import auroc
from ..metrics.selective import is_below
from ..reporter import SILENT, Reporter
from ..storage.atomic import new_file, output_folder
from .fields import Field, compare, summarize
from .nbest import NBest
from .uncertainty import Uncertainty, by_answer, judge, measure, or_none
from .utilities import AnswerExtractor, Utility, exact


def utility_matrix(texts: Sequence[str], utility: Utility) -> np.ndarray:
    """Return u(texts[i], texts[j]) at [i, j], float64; equal texts are compared once."""
    unique = list(dict.fromkeys(texts))
    place = {text: index for index, text in enumerate(unique)}
    pairs = [(a, b) for a in unique for b in unique]
    square = utility([a for a, _ in pairs], [b for _, b in pairs]).reshape(len(unique), len(unique))
    index = [place[text] for text in texts]
    return square[np.ix_(index, index)]


def choose(expected: np.ndarray, logprobs: Sequence[float]) -> int:
    """Return the index of the largest expected utility; of equal ones that of the largest log-probability."""
    # The same utilities summed in another order differ in their last bits.
    best = np.flatnonzero(expected >= expected.max() - 1e-9)
    return int(max(best, key=lambda i: logprobs[i]))


def disagreement(utilities: np.ndarray, members: Sequence[int]) -> float:
    """Return 1 − the mean utility between outputs of different members; with one member, between different outputs."""
    member = np.asarray(members)
    others = member[:, None] != member
    if not others.any():
        others = ~np.eye(len(member), dtype=bool)
    return float(1 - utilities[others].mean()) if others.any() else 0.0


def sizes(n: int) -> list[int]:
    """Return the numbers of outputs that a curve has: 8, 16, … up to n, which is the last."""
    doubled = [8 << k for k in range(n.bit_length())]
    return [*(size for size in doubled if size < n), n]


@dataclass(frozen=True)
class MBRSettings:
    """How outputs are compared."""

    utility: Utility  # how good an output is if another is right
    answers: AnswerExtractor  # finds the answer in an output, which is right if it equals the reference's
    clusters: Callable[[Sequence[str | None]], Sequence[int]] = by_answer  # answers of one meaning share a number
    fields: Sequence[str] = ()  # of JSON answers, whose confidence is wanted too (`fields.check_fields`)
    temperature: float = 1.0  # of the confidence (`uncertainty.measure`)


@dataclass(frozen=True)
class Choice:
    """The output that was chosen for one prompt, its expected utility, and how sure the outputs are of it."""

    prompt: str
    reference: str | None
    index: int
    text: str
    answer: str | None
    member: int
    expected_utility: float
    disagreement: float  # 1 − the mean utility between outputs of different members
    uncertainty: Uncertainty
    abstain: bool | None = None  # whether not to answer; None without a threshold
    fields: dict[str, Field] = field(default_factory=dict)  # how sure the outputs are of the fields of its JSON

    def record(self) -> dict[str, Any]:
        """Return the line of JSONL: without nesting, and without what was not asked for."""
        record = asdict(self)
        record |= record.pop("uncertainty")
        optional = {name: record.pop(name) for name in ("abstain", "fields")}
        return record | {name: value for name, value in optional.items() if value not in (None, {})}


@dataclass(frozen=True)
class CurvePoint:
    """The result with the first n outputs: accuracy, its standard error, and mean utility against the references."""

    n: int
    accuracy: float
    se: float
    utility: float


@dataclass(frozen=True)
class MBRResult:
    """The choices for one file of n-best lists, and how good they are: that is empty or None without references."""

    choices: list[Choice]  # with all n outputs, one for each prompt
    fields: dict[str, dict[str, float | None]] = field(default_factory=dict)  # `fields.summarize`
    curve: list[CurvePoint] = field(default_factory=list)  # with the first 8, 16, … and with all n outputs
    single: float | None = None  # the accuracy of one output taken at random
    auroc: float | None = None  # of the disagreement, for a wrong choice; None if all or none are wrong
    right: list[float] = field(default_factory=list)  # 1 where a choice is right, else 0
    uncertainty: dict[str, dict[str, float | None]] = field(default_factory=dict)  # `uncertainty.judge`

    def abstaining(self, threshold: float) -> MBRResult:
        """Return this with the choices marked that are less sure than `threshold`: those are not answered."""
        marked = [replace(c, abstain=is_below(c.uncertainty.confidence, threshold)) for c in self.choices]
        return replace(self, choices=marked)

    @property
    def coverage(self) -> float | None:
        """The share of the prompts that is answered; None without a threshold."""
        abstain = [choice.abstain for choice in self.choices]
        return None if None in abstain else 1 - sum(map(bool, abstain)) / len(abstain)

    @property
    def answered_accuracy(self) -> float | None:
        """The share of the answers that is right; None without references, threshold, or answers."""
        answered = [right for right, choice in zip(self.right, self.choices, strict=False) if choice.abstain is False]
        return float(np.mean(answered)) if answered else None

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        last = self.curve[-1] if self.curve else None
        return {
            "prompts": len(self.choices),
            "accuracy": last and last.accuracy,
            "se": last and last.se,
            "utility": last and last.utility,
            "single": self.single,
            "curve": [asdict(point) for point in self.curve],
            "disagreement": float(np.mean([choice.disagreement for choice in self.choices])),
            "auroc": self.auroc,
            "uncertainty": self.uncertainty,
            "coverage": self.coverage,
            "answered_accuracy": self.answered_accuracy,
            "fields": self.fields,
        }


def mbr(nbests: Sequence[NBest], settings: MBRSettings, reporter: Reporter = SILENT) -> MBRResult:
    """Choose an output for each prompt, with the first 8, 16, … and with all of its outputs.

    A choice is right if its answer is the reference's. Accuracies need a reference on every line.
    """
    numbers = sizes(len(nbests[0].texts))
    advance = reporter.begin("choosing", len(nbests))
    choices: list[Choice] = []
    right, quality, single = [], [], []  # of each prompt: with each number of outputs, and of one output
    for nbest in nbests:
        utilities = utility_matrix(nbest.texts, settings.utility)
        expected = [utilities[:n, :n].mean(1) for n in numbers]
        chosen = [choose(values, nbest.logprobs) for values in expected]
        best, answers = chosen[-1], [settings.answers(text) for text in nbest.texts]
        choices.append(
            Choice(
                nbest.prompt,
                nbest.reference,
                best,
                nbest.texts[best],
                answers[best],
                nbest.members[best],
                float(expected[-1][best]),
                disagreement(utilities, nbest.members),
                measure(settings.clusters(answers), nbest.members, best, settings.temperature),
                fields=compare(nbest.texts, best, settings.fields),
            )
        )
        if nbest.reference is not None:
            hits = exact(settings.answers)(nbest.texts, [nbest.reference] * len(nbest.texts))
            right.append(hits[chosen])
            single.append(hits.mean())
            quality.append(settings.utility([nbest.texts[i] for i in chosen], [nbest.reference] * len(chosen)))
        advance(1)
    result = MBRResult(choices, summarize([c.fields for c in choices], [c.reference for c in choices]))
    if len(right) < len(nbests):
        return result
    curve = [
        CurvePoint(n, float(accuracy), math.sqrt(accuracy * (1 - accuracy) / len(nbests)), float(utility))
        for n, accuracy, utility in zip(numbers, np.mean(right, 0), np.mean(quality, 0), strict=True)
    ]
    wrong = 1 - np.array(right)[:, -1]
    return replace(
        result,
        curve=curve,
        single=float(np.mean(single)),
        auroc=or_none(auroc(np.array([choice.disagreement for choice in choices]), wrong)),
        right=(1 - wrong).tolist(),
        uncertainty=judge([choice.uncertainty for choice in choices], wrong, np.array(quality)[:, -1]),
    )


def save_choices(results: Mapping[str, MBRResult], folder: Path) -> list[Path]:
    """Write the choices of each file as LABEL.jsonl into `folder`, and return the paths."""
    output_folder(folder)
    paths = [folder / f"{label}.jsonl" for label in results]
    for path, result in zip(paths, results.values(), strict=True):
        with new_file(path) as temporary:
            lines = [json.dumps(choice.record(), ensure_ascii=False) + "\n" for choice in result.choices]
            temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return paths


def label_files(files: Sequence[str]) -> dict[str, str]:
    """Return path by label, for `path` and `label=path`; without a label the file's name is it.

    Raises IVONError if two files have one label.
    """
    paths: dict[str, str] = {}
    for given in files:
        label, equals, path = given.partition("=")
        if not equals or not label or "/" in label or os.path.lexists(given):
            label, path = Path(given).stem, given
        if label in paths:
            raise IVONError(f"FILE {given}: the label {label!r} is taken by {paths[label]}; say other={path}")
        paths[label] = path
    return paths
