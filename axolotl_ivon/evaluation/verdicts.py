"""What the NLL of the variants says in words: mean against base model, draws against mean. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..metrics.verdict import LABELS, Paired, examples_needed, figures, judge
from ..records.evaluation import VariantResult, VerdictResult

# Each verdict: a variant, and what it is compared with.
_QUESTIONS = (("mean", "base"), ("posterior", "mean"), ("posterior+temperature", "mean+temperature"))
_REFERENCES = {"base": "the base model", "mean": "the mean", "mean+temperature": "the mean at its own"}


def verdicts(rows: Sequence[VariantResult]) -> list[VerdictResult]:
    """Return what the NLL says, file by file: mean against base model, draws against mean, each also calibrated."""
    return [
        _verdict(row, than)
        for path in dict.fromkeys(row.data for row in rows)
        for name, than in _QUESTIONS
        for row in rows
        if (row.data, row.name) == (path, name) and "nll" in row.versus(than)
    ]


def _verdict(row: VariantResult, than: str) -> VerdictResult:
    versus = {metric: Paired(own.difference or 0.0, own.standard_error) for metric, own in row.versus(than).items()}
    difference, error = versus["nll"].difference, versus["nll"].standard_error or 0.0
    verdict = judge(difference, error, row.examples)
    needed = examples_needed(row.examples, difference, error) if verdict == "within noise" else None
    what, are, against, numbers = "the mean", "is", _REFERENCES[than], figures(versus)
    if row.name != "mean":
        what, are = ("one draw", "is") if row.samples == 1 else (f"{row.samples} draws", "are")
        what += " at a fitted temperature" if "temperature" in row.name else ""
    if verdict == "the same":
        text = f"{what} and {against} predict the same"
    elif verdict == "too few examples":
        text = f"{row.examples} examples are too few to tell {what} from {against}: {numbers}"
    elif verdict == "within noise":
        enough = f"about {needed:,}" if needed and needed <= 10**6 else "more than a million"
        others = [LABELS[m] for m in ("accuracy", "ece") if m in versus and versus[m].is_beyond_noise]
        but = f" in NLL, but not in {' and '.join(others)}" if others else ""
        text = f"{what} and {against} are within noise{but}: {numbers}; {enough} examples would tell"
    else:
        text = f"{what} {are} {verdict} than {against}: {numbers}"
    return VerdictResult(
        data=row.data, name=row.name, than=than, metric="nll", difference=difference, standard_error=error,
        verdict=verdict, examples_needed=needed, text=text,
    )  # fmt: skip
