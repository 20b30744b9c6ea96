"""Choosing the weights of a product of posteriors from data: a grid, its Pareto front over the files, and a choice.

Variational Model Merging (arXiv 2412.08147) previews the front of a multitask model by merging posteriors at many
weights, which costs no training. Every weight is evaluated on every file. The choice is made on one half of each file
and reported on the other; equal weights, the plain product of the Gaussians, are kept unless it is better than they
are beyond noise. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..evaluation.evaluate import Evaluation, Sampling
from ..evaluation.variants import Variant
from ..metrics.verdict import SIGNS, judge, measured
from ..posterior.combine import shares
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter, Stage
from ..storage.atomic import check_space, new_folder
from ..storage.format import write_json
from .sweep import pareto_front

if TYPE_CHECKING:
    from torch import Tensor

    from ..metrics.scores import Scores

WEIGHTS_FILE = "weights.json"
# Steps from one end of the grid to the other, by the number of posteriors.
_STEPS = {2: 8, 3: 4}


@dataclass(frozen=True)
class WeightsPoint:
    """Weights with the metrics of their product, by data file, on what chooses and on what reports."""

    weights: tuple[float, ...]
    chosen_on: dict[str, dict[str, Any]]
    reported_on: dict[str, dict[str, Any]]
    front: bool = False

    def describe(self) -> str:
        """Return the weights in words."""
        return ",".join(f"{weight:g}" for weight in self.weights)


@dataclass(frozen=True)
class WeightsSweep:
    """The outcome of a sweep over weights.

    Attributes:
        points: the grid.
        best: what is best by the average of `objective` over the files, on the part of them that chooses.
        chosen: `best`, or equal weights where it is not better beyond noise.
        outcome: of the best against equal weights, as `metrics.verdict.judge` says; "equal" where those are the best.
        difference, standard_error: of the average objective, best − equal, on the part that reports.
        text: all of it in a line.
    """

    points: list[WeightsPoint]
    best: WeightsPoint
    chosen: WeightsPoint
    objective: str
    outcome: str
    difference: float
    standard_error: float
    text: str


def grid(count: int) -> list[tuple[float, ...]]:
    """Return weights of so many posteriors that add up to their number, so that equal ones are 1 each."""
    steps = _STEPS.get(count, count)
    parts = itertools.product(range(steps + 1), repeat=count - 1)
    shares_of_all = [(*part, steps - sum(part)) for part in parts if sum(part) <= steps]
    weights = [tuple(count * part / steps for part in share) for share in shares_of_all]
    return weights if (1.0,) * count in weights else sorted([*weights, (1.0,) * count])


def check_files(adapters: Sequence[str], data: Sequence[str | Path]) -> None:
    """Raise IVONError unless there are posteriors to weigh and data to weigh them by."""
    shares(len(adapters))
    if len(set(data)) < 2:
        raise IVONError(
            f"{param_ref('data')}: weights are a trade-off between files, and this is one; give one for each adapter"
        )


def sweep_weights(
    evaluation: Evaluation,
    posteriors: Sequence[Posterior],
    objective: str = "nll",
    sampling: Sampling = Sampling(samples=0),
    reporter: Reporter = SILENT,
) -> WeightsSweep:
    """Evaluate the products of `posteriors` over `grid` on every file of `evaluation`, and choose from them.

    Args:
        evaluation: of the first posterior; its model takes the products.
        sampling: without samples the mean alone is evaluated, which is one pass a point.

    Raises:
        IVONError: as `Posterior.combine` and `evaluate` do, or a file has fewer than 4 examples.
    """
    import torch

    from ..metrics.bootstrap import compare
    from ..metrics.scores import metrics

    generator = torch.Generator().manual_seed(sampling.seed)
    halves: dict[str, tuple[Tensor, Tensor]] = {}  # by file, the numbers of the examples that choose, that report
    for path, numbers in evaluation.files.items():
        if len(numbers) < 4:
            raise IVONError(f"{param_ref('data')} {path}: {len(numbers)} examples cannot be split in two; give 200")
        order = torch.tensor(numbers)[torch.randperm(len(numbers), generator=generator)]
        halves[path] = order[: len(order) // 2], order[len(order) // 2 :]
    variant = Variant("product", tau=1.0 if sampling.samples else math.inf)
    sampling = replace(sampling, samples=max(1, sampling.samples))
    candidates = grid(len(posteriors))
    stage = Stage(reporter, "evaluating", len(candidates) * sampling.samples * len(evaluation.items))
    points: list[WeightsPoint] = []
    kept: dict[tuple[float, ...], Scores] = {}
    for weights in candidates:
        product = Posterior.combine(posteriors, weights=weights)
        [kept[weights]] = evaluation.run([variant], sampling, stage, product)
        chosen_on, reported_on = (
            {path: metrics(kept[weights].of_groups(half[part])) for path, half in halves.items()} for part in (0, 1)
        )
        points.append(WeightsPoint(weights, chosen_on, reported_on))
    costs = [[SIGNS[objective] * values[objective] for values in point.chosen_on.values()] for point in points]
    points = [replace(point, front=mark) for point, mark in zip(points, pareto_front(costs), strict=True)]
    best = points[min(range(len(points)), key=lambda place: sum(costs[place]))]
    equal = next(point for point in points if set(point.weights) == {1.0})
    if best is equal:
        text = f"equal weights are best by {objective}"
        return WeightsSweep(points, best, equal, objective, "equal", 0.0, 0.0, text)
    one, other = kept[best.weights], kept[equal.weights]
    paired = [compare(one.of_groups(report), other.of_groups(report))[objective] for _, report in halves.values()]
    difference = sum(each.difference for each in paired) / len(paired)
    error = math.hypot(*(each.standard_error or 0.0 for each in paired)) / len(paired)
    outcome = judge(difference, error, min(len(report) for _, report in halves.values()), SIGNS[objective])
    kept_equal = "" if outcome == "better" else ": keep equal weights"
    text = (
        f"best by {objective}, averaged over the files: weights {best.describe()}; on the other examples, against "
        f"equal weights: {measured(difference, error, sign='+')}: {outcome}{kept_equal}"
    )
    chosen = best if outcome == "better" else equal
    return WeightsSweep(points, best, chosen, objective, outcome, difference, error, text)


def save(
    result: WeightsSweep, posteriors: Sequence[Posterior], folder: Path, facts: dict[str, Any], overwrite: bool = False
) -> Path:
    """Write the product that was chosen as an adapter, with weights.json in its folder, and return that path.

    Raises:
        IVONError: the folder exists (and not `overwrite`), or cannot be written.
    """
    product = Posterior.combine(posteriors, weights=result.chosen.weights)
    check_space(folder, product.mean.bytes + product.sigma.bytes, "mean and σ")
    document = {
        "weights": list(result.chosen.weights),
        "method": "precision",
        "objective": result.objective,
        **facts,
        **{name: getattr(result, name) for name in ("outcome", "difference", "standard_error", "text")},
        "best": asdict(result.best),
        "points": [asdict(point) for point in result.points],
    }
    with new_folder(folder, overwrite, product.inputs) as new:
        product.save_pretrained(new, overwrite=True)
        write_json(new / WEIGHTS_FILE, document)
    return folder / WEIGHTS_FILE
