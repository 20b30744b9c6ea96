"""Whether the average over draws predicts better than the mean, on data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..inspect.diagnosis import compare
from .evaluate import Evaluation, choose_rows, count_passes

if TYPE_CHECKING:
    from ..metrics.scores import Scores


def draws_against_mean(
    adapter: str | Path,
    data: Sequence[str | Path],
    *,
    samples: int = 10,
    batch_size: int | None = None,
    progress: Any = None,
    **loading: Any,
) -> list[dict[str, Any]]:
    """Return `posterior.check.compare` of the NLL of mean and draws for each file.

    `loading` is what `Evaluation` takes, and `progress` has the methods `begin` and `notify` of the command line's.

    Raises:
        IVONError: as `Evaluation` and `evaluate` do.
    """
    rows = choose_rows(["mean", "posterior"])
    evaluation = Evaluation(adapter, data, rows=rows, **loading)
    told = {}
    if progress:
        total = count_passes(rows, samples) * len(evaluation.items)
        told = {"progress": progress.begin("evaluating", total), "notify": progress.notify}
    mean, draws = evaluation.run(rows, samples=samples, batch_size=batch_size, **told)
    found = []
    for path, numbers in evaluation.files.items():
        examples = torch.tensor(numbers)
        found.append(compare(path, _by_example(mean, examples), _by_example(draws, examples)))
    return found


def _by_example(scores: Scores, examples: torch.Tensor) -> Any:
    """Return the mean NLL of every example's predictions, which depend on one another."""
    part = scores.of_groups(examples)
    _, group = torch.unique(part.group, return_inverse=True)
    return (torch.bincount(group, part.nll) / torch.bincount(group)).numpy()
