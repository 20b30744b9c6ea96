"""What a paired difference means: whether it is more than noise, in numbers and in words.

Two standard errors side by side hide the answer: both predictions are wrong about the same examples. The bootstrap
draws the same examples for both, and the spread of the difference counts (Efron and Tibshirani 1993, chapter 8).
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

# What every other variant is compared with, where it is evaluated.
REFERENCES = ("mean", "base", "mean+temperature")
LIKELY = 2.0  # standard errors from zero that are no noise
FEWEST = 30  # examples below which a standard error says little
UNSEEN = 5e-4  # a difference that no table shows, as between the mean and the narrow draws of a short run
# Metrics that choose between predictions: +1 where less is better.
SIGNS = {"nll": 1, "ece": 1, "accuracy": -1, "brier": 1}
IN_WORDS = ("nll", "accuracy", "ece")  # of these a sentence tells


class Metric(NamedTuple):
    """How a metric is called, and whether it is written in per cent."""

    label: str
    short: str  # in the narrow tables of a terminal
    percent: bool = False

    def heading(self, form: str = ", %") -> str:
        """Return the heading of a column or axis; `form` is how the unit follows."""
        return self.label + form * self.percent

    def write(self, value: float | None, error: float | None = None, sign: str = "") -> str:
        """Return a value, or a difference, with its standard error."""
        return measured(value, error, *((100, 1) if self.percent else (1, 3)), sign)


METRICS = {
    "accuracy": Metric("accuracy", "acc", True),
    "ece": Metric("ECE", "ECE", True),
    "ece15": Metric("ECE-15", "ECE-15", True),
    "nll": Metric("NLL", "NLL"),
    "perplexity": Metric("perplexity", "PPL"),
    "brier": Metric("Brier", "Brier"),
    "auroc": Metric("AUROC", "AUROC"),
    "aupr": Metric("AUPR", "AUPR"),
    "fpr95": Metric("FPR95", "FPR95", True),
    "entropy": Metric("entropy", "entropy"),
    "expected_entropy": Metric("expected entropy", "expected"),
    "mutual_information": Metric("mutual information", "mutual"),
    "aurc": Metric("AURC", "AURC", True),
    "augrc": Metric("AUGRC", "AUGRC", True),
    "cov_at_5risk": Metric("coverage at 5 % risk", "cov@5", True),
    "risk_at_80cov": Metric("risk at 80 % coverage", "risk@80", True),
    "aece": Metric("adaptive ECE", "aECE", True),
}


class Paired(NamedTuple):
    """A difference in one metric between two variants on the same examples; the error is None if it is unknown."""

    difference: float
    standard_error: float | None

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the difference is `LIKELY` standard errors from zero; without an error it is not."""
        return bool(self.standard_error) and abs(self.difference) >= LIKELY * (self.standard_error or 0.0)


def judge(difference: float, error: float | None, examples: int, sign: int = 1) -> str:
    """Return "better", "worse", "within noise", "the same" or "too few examples".

    Args:
        difference: in a metric, to what it is compared with.
        error: its standard error; None counts as 0.
        examples: how many it was measured on.
        sign: +1 where less is better, −1 where more is.
    """
    if not difference and not error:
        return "the same"
    if examples < FEWEST:
        return "too few examples"
    if abs(difference) < LIKELY * (error or 0.0):
        return "within noise"
    if abs(difference) < UNSEEN:
        return "the same"
    return "better" if sign * difference < 0 else "worse"


def measured(value: float | None, error: float | None = None, scale: float = 1, digits: int = 3, sign: str = "") -> str:
    """Return a figure with its standard error, "–" where there is none; `sign` is "+" for a difference."""
    if value is None:
        return "–"
    text = f"{scale * value:{sign}.{digits}f}"
    return (text.replace("-", "−") if sign else text) + ("" if error is None else f" ± {scale * error:.{digits}f}")


def figures(values: Mapping[str, Paired], sign: str = "+") -> str:
    """Return differences, or values, and their errors in words: "NLL −0.010 ± 0.004, accuracy +1.2 ± 0.9 %"."""
    return ", ".join(
        f"{METRICS[metric].label} {METRICS[metric].write(*values[metric], sign)}{' %' * METRICS[metric].percent}"
        for metric in IN_WORDS
        if metric in values
    )


def examples_needed(examples: int, difference: float, error: float | None) -> int | None:
    """Return about how many examples would show a difference like this one, rounded to two digits; None for any number.

    The standard error falls with the root of the number, so n·(2·error/difference)² examples have it at half the
    difference.
    """
    if not difference:
        return None
    needed = examples * (LIKELY * (error or 0.0) / difference) ** 2
    if not math.isfinite(needed) or needed > 1e12:
        return None
    unit = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
    return math.ceil(needed / unit) * unit
