"""Minimum Bayes risk decoding over the outputs of several draws (Daheim et al., ICLR 2025, arXiv 2503.05318).

Of a prompt's outputs y_1 … y_n the one with the largest expected utility is chosen,

    argmax_i Σ_j w_j u(y_i, y_j),

where u(y_i, y_j) tells how good y_i is if y_j is right, and the weights say whose outputs count for how much:

    sequence level   w_j = 1/n: the outputs of all members in one pool (equation 9 there)
    model level      w_j = 1/(M·n_m), m being j's member: each member's own expectation, averaged over the M members,
                     which, as draws, have equal posterior weight

The two agree where every member gives the same number of outputs, as `ivon-post generate` has it. With the utility
"answers are equal" this is a vote.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from .data.chats import read_lines
from .errors import IVONError

LEVELS = ("sequence", "model")
SMALLEST_N = 8

# A pattern's first group is the answer (the whole match if it has none); of several matches the last counts.
ANSWERS = {
    "gsm8k": r"####\s*\$?(-?[\d,]*\.?\d+)",
    "boxed": r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",
    "choice": r"(?<![A-Za-z'])([A-HJ-Z])(?![A-Za-z'])",
}


@dataclass(frozen=True)
class NBest:
    """One prompt's outputs: a line of what `ivon-post generate` writes; `source` is `FILE:LINE`."""

    prompt: str
    reference: str | None
    texts: tuple[str, ...]
    members: tuple[int, ...]
    logprobs: tuple[float, ...]
    source: str


def read_nbest(path: str | Path) -> list[NBest]:
    """Read n-best lists, which need as many outputs on each line.

    `member` is 0 and `logprob` unknown where a line does not tell; an unknown log-probability loses every tie.

    Raises:
        IVONError: the file cannot be read, has no lines, or a line that is not such a list.
    """
    found: list[NBest] = []
    for source, record in read_lines(path, "FILE"):
        outputs, reference = record.get("outputs"), record.get("reference")
        if not isinstance(outputs, list) or not outputs or not isinstance(reference, str | None):
            raise IVONError(f"{source}: no list of outputs; give what `ivon-post generate` writes")
        for output in outputs:
            values = output if isinstance(output, dict) else {}
            logprob = values.get("logprob")
            known = logprob is None or (isinstance(logprob, int | float) and abs(logprob) < math.inf)
            if not isinstance(values.get("text"), str) or not isinstance(values.get("member", 0), int) or not known:
                raise IVONError(f"{source}: an output has no text, or a member or logprob that is no number")
        found.append(
            NBest(
                str(record.get("prompt", "")),
                reference,
                tuple(output["text"] for output in outputs),
                tuple(output.get("member", 0) for output in outputs),
                tuple(-math.inf if output.get("logprob") is None else output["logprob"] for output in outputs),
                source,
            )
        )
        if len(outputs) != len(found[0].texts):
            raise IVONError(f"{source}: {len(outputs)} outputs, but {len(found[0].texts)} on the first line")
    if not found:
        raise IVONError(f"FILE {path}: the file is empty; give what `ivon-post generate` writes")
    return found


# --- answers ----------------------------------------------------------------------------------------------------


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
                f"--answer-regex {pattern!r}: not a regular expression ({error}); presets are {', '.join(ANSWERS)}"
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
                f"--answer-regex {self.pattern!r} matches none of the {total} outputs in "
                f"{nbests[0].source.rpartition(':')[0]}, {_excerpt(missing[0])} for one; choose another"
            )
        for nbest in nbests:
            if nbest.reference is not None and self(nbest.reference) is None:
                raise IVONError(
                    f"{nbest.source}: --answer-regex {self.pattern!r} does not match the reference "
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


# --- utilities --------------------------------------------------------------------------------------------------

# Maps hypotheses and references, lists of one length, to utilities between 0 and 1, float64 of that length.
Utility = Callable[[Sequence[str], Sequence[str]], "np.ndarray"]


def _exact(answers: Answers) -> Utility:
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
        raise IVONError(f"--utility bertscore: its model cannot be loaded ({str(error).splitlines()[0]})") from None
    return lambda hypotheses, references: scorer.score(list(hypotheses), list(references))[2].double().numpy()


# exact: the answers are equal. bleu, chrf: of a sentence, by sacrebleu. rouge: F of ROUGE-L, stemmed, by rouge-score.
# bertscore: F of BERTScore for English.
UTILITIES: dict[str, Callable[[Answers], Utility]] = {
    "exact": _exact,
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    "rouge": _rouge,
    "bertscore": _bertscore,
}


def _import(module: str, package: str, utility: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise IVONError(f"--utility {utility} needs the package {package}: pip install {package}") from None


def utility_matrix(texts: Sequence[str], utility: Utility) -> np.ndarray:
    """Return u(texts[i], texts[j]) at [i, j], float64; equal texts are compared once."""
    unique = list(dict.fromkeys(texts))
    place = {text: index for index, text in enumerate(unique)}
    pairs = [(a, b) for a in unique for b in unique]
    square = utility([a for a, _ in pairs], [b for _, b in pairs]).reshape(len(unique), len(unique))
    index = [place[text] for text in texts]
    return square[np.ix_(index, index)]


# --- decoding ---------------------------------------------------------------------------------------------------


def expected_utility(utilities: np.ndarray, members: Sequence[int], level: str = "sequence") -> np.ndarray:
    """Return each output's expected utility, shape [n], from utilities of shape [n, n]; see above for `level`."""
    _, index, sizes = np.unique(np.asarray(members), return_inverse=True, return_counts=True)
    weights = 1 / (len(sizes) * sizes[index]) if level == "model" else np.full(len(index), 1 / len(index))
    return utilities @ weights


def choose(expected: np.ndarray, logprobs: Sequence[float]) -> int:
    """Return the index of the largest expected utility; of equal ones that of the largest log-probability."""
    # The same utilities summed in another order differ in their last bits.
    best = np.flatnonzero(expected >= expected.max() - 1e-9)
    return int(max(best, key=lambda i: logprobs[i]))


def disagreement(utilities: np.ndarray, members: Sequence[int]) -> float:
    """Return 1 − the mean utility between outputs of different members; with one member, between different outputs."""
    own = np.asarray(members)
    other = own[:, None] != own
    if not other.any():
        other = ~np.eye(len(own), dtype=bool)
    return float(1 - utilities[other].mean()) if other.any() else 0.0


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the probability that a positive has the larger score than a negative, ties being half; None without both.

    `score` and `positive` (bool) have shape [n].
    """
    high, low = score[positive][:, None], score[~positive]
    if not high.size or not low.size:
        return None
    return float(np.mean((high > low) + 0.5 * (high == low)))


@dataclass(frozen=True)
class Choice:
    """What was chosen for one prompt: which output, its expected utility, and how far the members disagree."""

    prompt: str
    reference: str | None
    index: int
    text: str
    answer: str | None
    member: int
    expected_utility: float
    disagreement: float


@dataclass(frozen=True)
class Point:
    """The result with the first n outputs: accuracy, its standard error, and mean utility against the references."""

    n: int
    accuracy: float
    se: float
    utility: float


@dataclass(frozen=True)
class Decoded:
    """The choices for one file of n-best lists, and how good they are where there are references.

    Attributes:
        choices: with all n outputs, one for each prompt.
        curve: from the first 8 outputs on, doubling, up to all n; empty without references.
        single: the accuracy of one output taken at random.
        auroc: of the disagreement, for the choice being wrong; None if all or none are wrong.
    """

    choices: list[Choice]
    curve: list[Point]
    single: float | None
    auroc: float | None

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
        }


def sizes(n: int) -> list[int]:
    """Return the numbers of outputs that a curve has: 8, 16, … up to n, which is the last."""
    doubled = [SMALLEST_N << k for k in range(n.bit_length())]
    return [*(size for size in doubled if size < n), n]


def decode(
    nbests: Sequence[NBest],
    utility: Utility,
    answers: Answers,
    level: str = "sequence",
    progress: Callable[[int], None] | None = None,
) -> Decoded:
    """Choose an output for each prompt, with the first 8, 16, … and with all of its outputs.

    A choice is right if its answer is the reference's. Accuracies need a reference on every line.

    Args:
        level: "sequence" or "model".
        progress: told, after each prompt, that one more is done.
    """
    scored = all(nbest.reference is not None for nbest in nbests)
    steps = sizes(len(nbests[0].texts))
    choices: list[Choice] = []
    right = np.zeros((len(steps), len(nbests)))
    gained = np.zeros_like(right)
    single: list[float] = []
    for number, nbest in enumerate(nbests):
        utilities = utility_matrix(nbest.texts, utility)
        chosen, expected = 0, np.zeros(1)
        for row, n in enumerate(steps):
            expected = expected_utility(utilities[:n, :n], nbest.members[:n], level)
            chosen = choose(expected, nbest.logprobs)
            if nbest.reference is not None:
                right[row, number] = _exact(answers)([nbest.texts[chosen]], [nbest.reference])[0]
                gained[row, number] = utility([nbest.texts[chosen]], [nbest.reference])[0]
        if nbest.reference is not None:
            single.append(_exact(answers)(nbest.texts, [nbest.reference] * len(nbest.texts)).mean())
        choices.append(
            Choice(
                nbest.prompt,
                nbest.reference,
                chosen,
                nbest.texts[chosen],
                answers(nbest.texts[chosen]),
                nbest.members[chosen],
                float(expected[chosen]),
                disagreement(utilities, nbest.members),
            )
        )
        if progress:
            progress(1)
    if not scored:
        return Decoded(choices, [], None, None)
    curve = []
    for n, own, worth in zip(steps, right, gained, strict=True):
        accuracy = float(own.mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(nbests))
        curve.append(Point(n, accuracy, error, float(worth.mean())))
    score = np.array([choice.disagreement for choice in choices])
    return Decoded(choices, curve, float(np.mean(single)), auroc(score, right[-1] == 0))


def labels(files: Sequence[str]) -> dict[str, str]:
    """Return path by label, for `path` and `label=path`; without a label the file's name does.

    Raises:
        IVONError: two files have one label.
    """
    found: dict[str, str] = {}
    for given in files:
        label, equals, path = given.partition("=")
        if not equals or not label or "/" in label or os.path.lexists(given):
            label, path = Path(given).stem, given
        if label in found:
            raise IVONError(f"FILE {given}: the label {label!r} is taken by {found[label]}; say other={path}")
        found[label] = path
    return found


def save(results: Mapping[str, Decoded], folder: Path) -> list[Path]:
    """Write each file's choices as LABEL.jsonl and, where there are accuracies, figure 3 as PNG and SVG.

    Returns:
        The files.

    Raises:
        IVONError: a file cannot be written.
    """
    from .files import new_file, output_folder

    output_folder(folder)
    paths: list[Path] = []
    for label, result in results.items():
        paths.append(folder / f"{label}.jsonl")
        with new_file(paths[-1]) as temporary:
            lines = [json.dumps(asdict(choice), ensure_ascii=False) + "\n" for choice in result.choices]
            temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    curves = {label: result.curve for label, result in results.items() if result.curve}
    if curves:
        from .evaluation.report import scaling

        figure = scaling(curves)
        for kind in ("png", "svg"):
            paths.append(folder / f"accuracy.{kind}")
            with new_file(paths[-1]) as temporary:
                figure.savefig(temporary, format=kind, dpi=150)
    return paths
