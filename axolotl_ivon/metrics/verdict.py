"""Is one row better than another? Paired differences, and a verdict in words.

Two standard errors side by side hide the answer: the rows are wrong about the same examples. The bootstrap draws the
same examples for both, and the spread of the difference is what counts (Efron and Tibshirani 1993, chapter 8).

Importing this module imports no torch: a verdict needs no more than what `ivon-post eval --json` has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# What every other row is compared with, where it is evaluated.
REFERENCES = ("mean", "base", "mean+temperature")
# Each verdict: a row, and what it is held against.
_QUESTIONS = (("mean", "base"), ("posterior", "mean"), ("posterior+temperature", "mean+temperature"))
_LIKELY = 2.0  # standard errors from zero that are no noise
# What a verdict shows: metric, its name, factor, digits, unit.
_SHOWN = (("nll", "NLL", 1, 3, ""), ("accuracy", "accuracy", 100, 1, " %"), ("ece", "ECE", 100, 1, " %"))
_FEWEST = 30  # examples below which a standard error says little


def differences(
    values: Mapping[str, float | None],
    other: Mapping[str, float | None],
    resamples: Mapping[str, Tensor],
    other_resamples: Mapping[str, Tensor],
) -> dict[str, dict[str, float | None]]:
    """Return, for every metric that both have, `difference` (to `other`) and its `standard_error`.

    Args:
        values, other: the metrics of two rows.
        resamples, other_resamples: theirs under the same resampling (`metrics.bootstrap`).
    """
    from .scores import standard_error

    found: dict[str, dict[str, float | None]] = {}
    for name, value in values.items():
        against = other[name]
        if value is not None and against is not None:
            error = standard_error(resamples[name] - other_resamples[name])
            found[name] = {"difference": value - against, "standard_error": error}
    return found


def examples_needed(examples: int, difference: float, error: float) -> int | None:
    """Return about how many examples would show a difference like this one, rounded to two digits; None for any number.

    The standard error falls with the root of the number, so n·(2·error/difference)² examples have it at half the
    difference.
    """
    if not difference:
        return None
    needed = examples * (_LIKELY * error / difference) ** 2
    if not math.isfinite(needed) or needed > 1e12:
        return None
    unit = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
    return math.ceil(needed / unit) * unit


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the NLL says, file by file: mean against base model, draws against mean, each also calibrated.

    Args:
        rows: those of `summarize`, or of the document that `ivon-post eval --json` prints.

    Returns:
        For each question that `rows` can answer: `data`, `name`, `than`, `metric`, `difference`, `standard_error`,
        `verdict` ("better", "worse", "within noise", "the same" or "too few examples"), `examples_needed` (None unless
        it is within noise) and `text`, a line for people.
    """
    return [
        _verdict(row, than)
        for path in dict.fromkeys(row["data"] for row in rows)
        for name, than in _QUESTIONS
        for row in _named(rows, path, name)
        if "nll" in row.get(f"versus_{than}", {})
    ]


def _named(rows: Iterable[Mapping[str, Any]], path: str, name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if (row["data"], row["name"]) == (path, name)]


def _verdict(row: Mapping[str, Any], than: str) -> dict[str, Any]:
    versus = row[f"versus_{than}"]
    difference, error = versus["nll"]["difference"], versus["nll"]["standard_error"] or 0.0
    examples, needed = row["examples"], None
    what, are = _subject(row)
    against = {"base": "the base model", "mean": "the mean", "mean+temperature": "the mean at its own"}[than]
    shown = [line for line in _SHOWN if line[0] in versus]
    figures = ", ".join(
        f"{label} {_signed(versus[metric], scale, digits)}{unit}" for metric, label, scale, digits, unit in shown
    )
    if not difference and not error:
        verdict, text = "the same", f"{what} and {against} predict the same"
    elif examples < _FEWEST:
        verdict, text = "too few examples", f"{examples} examples are too few to tell {what} from {against}: {figures}"
    elif abs(difference) >= _LIKELY * error:
        verdict = "better" if difference < 0 else "worse"
        text = f"{what} {are} {verdict} than {against}: {figures}"
    else:
        verdict, needed = "within noise", examples_needed(examples, difference, error)
        told = f"about {needed:,}" if needed and needed <= 10**6 else "more than a million"
        would = f"{told} examples would tell"
        others = " and ".join(label for metric, label, *_ in shown if _is_one(versus[metric]))
        but = f" in NLL, but not in {others}" if others else ""
        text = f"{what} and {against} are within noise{but}: {figures}; {would}"
    return {
        "data": row["data"],
        "name": row["name"],
        "than": than,
        "metric": "nll",
        "difference": difference,
        "standard_error": error,
        "verdict": verdict,
        "examples_needed": needed,
        "text": text,
    }


def _is_one(versus: Mapping[str, float | None]) -> bool:
    """Whether a difference is beyond noise."""
    error = versus["standard_error"]
    return bool(error) and abs(versus["difference"] or 0.0) >= _LIKELY * (error or 0.0)


def _subject(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the row is in words, and its verb."""
    if row["name"] == "mean":
        return "the mean", "is"
    one = row["samples"] == 1
    scaled = " at a fitted temperature" if "temperature" in row["name"] else ""
    return f"{'one draw' if one else str(row['samples']) + ' draws'}{scaled}", "is" if one else "are"


def _signed(versus: Mapping[str, float | None], scale: float, digits: int) -> str:
    difference, error = versus["difference"], versus["standard_error"]
    text = f"{scale * (difference or 0):+.{digits}f}".replace("-", "−")
    return text + (f" ± {scale * error:.{digits}f}" if error is not None else "")
