"""Choosing the weights of a product of posteriors from data: a grid, its Pareto front over the files, and a choice.

Variational Model Merging (arXiv 2412.08147) previews the front of a multitask model by merging posteriors at many
weights, which costs no training. Every weight is evaluated on every file. The choice is made on one half of each file
and reported on the other; equal weights, the plain product of the Gaussians, are kept unless it is better than they
are beyond noise.

Importing this module imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..metrics.verdict import differences
from ..posterior.combine import shares
from ..posterior.posterior import Posterior
from ..storage.atomic import check_space, new_folder
from ..storage.format import write_json
from .sweep import FEWEST, LIKELY, OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.evaluate import Evaluation
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
        outcome: "better", "worse", "within noise" or "too few examples", of the best against equal weights; or "equal".
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
    found = [(*part, steps - sum(part)) for part in parts if sum(part) <= steps]
    weights = [tuple(count * part / steps for part in one) for one in found]
    return weights if (1.0,) * count in weights else sorted([*weights, (1.0,) * count])


def pareto(points: Sequence[WeightsPoint], objective: str) -> list[bool]:
    """Say of every point whether no other is as good on every file and better on one, on what chooses."""
    sign = OBJECTIVES[objective]
    places = [[sign * values[objective] for values in point.chosen_on.values()] for point in points]
    return [
        not any(other != own and all(x <= y for x, y in zip(other, own, strict=True)) for other in places)
        for own in places
    ]


def check_files(adapters: Sequence[str], data: Sequence[str]) -> None:
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
    seed: int = 0,
    *,
    samples: int = 0,
    notify: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> WeightsSweep:
    """Evaluate the products of `posteriors` over `grid` on every file of `evaluation`, and choose from them.

    Args:
        evaluation: of the first posterior; its model takes the products.
        samples: draws to average, or 0 for the mean alone, which is one pass a point.
        options: of `evaluate.evaluate`.

    Raises:
        IVONError: as `Posterior.combine` and `evaluate` do, or a file has fewer than 4 examples.
    """
    import torch

    from ..evaluation.evaluate import Variant, evaluate

    generator = torch.Generator().manual_seed(seed)
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    for path, numbers in evaluation.files.items():
        if len(numbers) < 4:
            raise IVONError(f"{param_ref('data')} {path}: {len(numbers)} examples cannot be split in two; give 200")
        order = torch.tensor(numbers)[torch.randperm(len(numbers), generator=generator)]
        halves[path] = order[: len(order) // 2], order[len(order) // 2 :]
    row = Variant("product", tau=1.0 if samples else math.inf)
    points: list[WeightsPoint] = []
    kept: dict[tuple[float, ...], Scores] = {}
    for weights in grid(len(posteriors)):
        product = Posterior.combine(posteriors, weights=weights)
        [kept[weights]] = evaluate(
            evaluation.model, product, evaluation.items, [row], evaluation.task, samples=max(1, samples), seed=seed,
            notify=notify, **options,
        )  # fmt: skip
        points.append(WeightsPoint(weights, *_by_file(kept[weights], halves)))
    points = [replace(one, front=mark) for one, mark in zip(points, pareto(points, objective), strict=True)]
    sign = OBJECTIVES[objective]
    best = min(points, key=lambda one: sum(sign * values[objective] for values in one.chosen_on.values()))
    equal = next(one for one in points if set(one.weights) == {1.0})
    if best is equal:
        told = f"equal weights are best by {objective}"
        return WeightsSweep(points, best, equal, objective, "equal", 0.0, 0.0, told)
    difference, error = _versus(kept[best.weights], kept[equal.weights], best, equal, halves, objective)
    fewest = min(len(report) for _, report in halves.values())
    if fewest < FEWEST:
        outcome = "too few examples"
    elif abs(difference) < LIKELY * error:
        outcome = "within noise"
    else:
        outcome = "better" if sign * difference < 0 else "worse"
    kept_equal = "" if outcome == "better" else ": keep equal weights"
    figures = f"{difference:+.3f} ± {error:.3f}".replace("-", "−")
    text = (
        f"best by {objective}, averaged over the files: weights {best.describe()}; on the other examples, "
        f"against equal weights: {figures}: {outcome}{kept_equal}"
    )
    chosen = best if outcome == "better" else equal
    return WeightsSweep(points, best, chosen, objective, outcome, difference, error, text)


def _by_file(
    scores: Scores, halves: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    from ..metrics.scores import metrics

    chooses, reports = ({path: metrics(scores.of_groups(half[i])) for path, half in halves.items()} for i in (0, 1))
    return chooses, reports


def _versus(
    one: Scores,
    other: Scores,
    best: WeightsPoint,
    equal: WeightsPoint,
    halves: dict[str, tuple[Tensor, Tensor]],
    objective: str,
) -> tuple[float, float]:
    """Return the difference of the average objective on the parts that report, and its standard error."""
    from ..metrics.scores import bootstrap

    found = [
        differences(
            best.reported_on[path], equal.reported_on[path],
            *(bootstrap(scores.of_groups(report)) for scores in (one, other)),
        )[objective]
        for path, (_, report) in halves.items()
    ]  # fmt: skip
    count = len(found)
    error = math.sqrt(sum((each["standard_error"] or 0.0) ** 2 for each in found)) / count
    return sum(each["difference"] or 0.0 for each in found) / count, error


def save(
    result: WeightsSweep, posteriors: Sequence[Posterior], folder: Path, facts: dict[str, Any], overwrite: bool = False
) -> Path:
    """Write the product that was chosen as an adapter, with weights.json in its folder, and return that path.

    Raises:
        IVONError: the folder exists (and not `overwrite`), or cannot be written.
    """
    product = Posterior.combine(posteriors, weights=result.chosen.weights)
    check_space(folder, product.mean.bytes + product.sigma.bytes, "mean and σ")
    inputs = [folder for q in posteriors for folder in q.inputs]
    document = {
        "weights": list(result.chosen.weights),
        "method": "precision",
        "objective": result.objective,
        **facts,
        **{name: getattr(result, name) for name in ("outcome", "difference", "standard_error", "text")},
        "best": asdict(result.best),
        "points": [asdict(point) for point in result.points],
    }
    with new_folder(folder, overwrite, inputs) as new:
        product.save_pretrained(new, overwrite=True)
        write_json(new / WEIGHTS_FILE, document)
    return folder / WEIGHTS_FILE
