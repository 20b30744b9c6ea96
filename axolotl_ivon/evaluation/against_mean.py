"""Whether the average over draws predicts better than the mean, on data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..metrics.scores import Scores
from ..metrics.verdict import judge
from ..models.session import Loading
from ..reporter import SILENT, Reporter
from .evaluate import Evaluation, EvaluationData, Sampling
from .variants import VariantChoice

_ADVICE = {"better": "", "worse": "; narrow them by a larger τ"}


def draws_against_mean(
    adapter: str | Path,
    data: EvaluationData,
    sampling: Sampling = Sampling(),
    loading: Loading = Loading(),
    reporter: Reporter = SILENT,
) -> list[dict[str, Any]]:
    """Return for each file how the NLL of the draws differs from that of the mean.

    Returns:
        Dicts of `data`, `examples`, `difference` (draws − mean), its standard error `se` (None of one example), and
        `finding`, as in `inspect.diagnosis.diagnose`.

    Raises:
        IVONError: as `Evaluation` and `evaluate` do.
    """
    variants = VariantChoice(["mean", "posterior"]).variants()
    evaluation = Evaluation(adapter, data, variants, loading, reporter)
    mean, draws = evaluation.run(variants, sampling, reporter)
    return [
        _compare(path, draws.of_groups(examples), mean.of_groups(examples))
        for path, examples in ((path, torch.tensor(numbers)) for path, numbers in evaluation.files.items())
    ]


def _compare(data: str, draws: Scores, mean: Scores) -> dict[str, Any]:
    differences = draws.mean_of_groups(draws.nll) - mean.mean_of_groups(mean.nll)
    count, difference = len(differences), differences.mean().item()
    error = differences.std().item() / math.sqrt(count) if count > 1 else None
    outcome = judge(difference, error, count)
    figures = f"NLL {difference:+.3g}{'' if error is None else f' ± {error:.2g}'} on {count:,} examples of {data}"
    if outcome in _ADVICE:
        text = f"the draws are {outcome} than the mean: {figures}{_ADVICE[outcome]}"
    else:
        text = f"draws and mean cannot be told apart: {figures}; use more data, or the mean"
    finding = {"about": "draws", "good": outcome == "better", "text": text}
    return {"data": data, "examples": count, "difference": difference, "se": error, "finding": finding}
