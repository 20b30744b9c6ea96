"""Choosing temperature and pruning ratio from data: a grid, its Pareto front, and a recommendation that is honest.

The paper leaves both to the user (arXiv 2506.14280, figure 2 shows the trade-off). Here the choice is made on one half
of the data and reported on the other, so what `recommended.json` promises was not fitted to.

Importing this module imports no torch: the commands that only read a recommendation stay quick.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, parameter
from ..storage.atomic import new_file
from ..storage.format import read_json, write_json

if TYPE_CHECKING:
    from .evaluate import Evaluation, Row
    from .metrics import Scores

# What an objective makes small.
OBJECTIVES = {"nll": 1, "ece": 1, "accuracy": -1, "brier": 1}
RECOMMENDED_FILE = "recommended.json"


def read_recommended(path: str | Path) -> tuple[float, float]:
    """Return (τ, pruning ratio) from the file that `ivon-post sweep` wrote.

    Raises:
        IVONError: the file cannot be read, is not such a file, or holds a τ ≤ 0 or a ratio outside [0, 1].
    """
    named, fix = parameter("recommended"), "give the recommended.json that `ivon-post sweep` wrote"
    try:
        facts = read_json(Path(path))
    except IVONError as error:
        raise IVONError(f"{named} cannot be read: {error}; {fix}") from None
    if not {"tau", "ratio"} <= facts.keys():
        raise IVONError(f"{named} {path}: it has no `tau` and `ratio`; {fix}")
    tau, ratio = (math.inf if value == "inf" else value for value in (facts["tau"], facts["ratio"]))
    if not _is_number(tau) or not tau > 0:
        raise IVONError(f'{named} {path}: tau is {facts["tau"]!r}; it must be a number > 0, or "inf"')
    if not _is_number(ratio) or not 0 <= ratio <= 1:
        raise IVONError(f"{named} {path}: ratio is {facts['ratio']!r}; it must be between 0 and 1")
    return float(tau), float(ratio)


@dataclass(frozen=True)
class Decision:
    """What a recommendation says of the averaged prediction: how to scale it, and from where on to answer.

    Attributes:
        temperature: its log-probabilities are divided by this.
        threshold: answer where the confidence is at least this; None: always.
        score: what that confidence is: "probability" of the likeliest class, or "agreement" of the outputs of `mbr`.
        mean_sha256: the adapter that it was found with.
    """

    temperature: float = 1.0
    threshold: float | None = None
    score: str = "probability"
    mean_sha256: str | None = None


def read_decision(path: str | Path) -> Decision:
    """Return what else than τ and ratio the file of `read_recommended` says.

    Raises:
        IVONError: as `read_recommended` does; a temperature ≤ 0, or a threshold outside [0, 1].
    """
    read_recommended(path)
    named, facts = parameter("recommended"), read_json(Path(path))
    temperature, threshold = facts.get("temperature", 1.0), facts.get("threshold")
    if not _is_number(temperature) or not temperature > 0:
        raise IVONError(f"{named} {path}: temperature is {temperature!r}; it must be a number > 0")
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        raise IVONError(f"{named} {path}: threshold is {threshold!r}; it must be between 0 and 1")
    return Decision(
        float(temperature),
        None if threshold is None else float(threshold),
        str(facts.get("score", "probability")),
        facts.get("mean_sha256"),
    )


def write_recommended(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write recommended.json with `facts` into a folder that is there, and return its path.

    Raises:
        IVONError: it cannot be written.
    """
    with new_file(folder / RECOMMENDED_FILE) as temporary:
        write_json(temporary, facts)
    return folder / RECOMMENDED_FILE


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def pareto_front(values: Sequence[dict[str, Any]]) -> list[bool]:
    """Say of every point's metrics whether no other has as good an accuracy and ECE, and one of them better."""
    places = [(-value["accuracy"], value["ece"]) for value in values]
    return [
        not any(other[0] <= place[0] and other[1] <= place[1] and other != place for other in places)
        for place in places
    ]


def best(values: Sequence[dict[str, Any]], objective: str) -> int:
    """Return the place of the best metrics by `objective`; NLL decides between equals, then the earlier place."""
    sign = OBJECTIVES[objective]
    return min(range(len(values)), key=lambda i: (sign * values[i][objective], values[i]["nll"]))


@dataclass(frozen=True)
class GridPoint:
    """One (τ, ratio) with its metrics on the half that chooses and on the half that reports."""

    tau: float
    ratio: float
    chosen_on: dict[str, Any]
    reported_on: dict[str, Any]
    front: bool


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        points: the grid, ratio by ratio, τ ascending.
        recommended: the place in `points` that is best by `objective` on the half that chooses.
        error: bootstrap standard errors of the recommended point's metrics on the half that reports.
        reliability: scores on the half that reports, by name: of the mean and the posterior as they are, where the
            grid has them, and of the recommended point.
    """

    points: list[GridPoint]
    recommended: int
    objective: str
    error: dict[str, float | None]
    reliability: dict[str, Scores]

    def find(self, tau: float, ratio: float) -> GridPoint | None:
        """Return the grid point, or None."""
        return next((p for p in self.points if (p.tau, p.ratio) == (tau, ratio)), None)


def check_grid(taus: Sequence[float], ratios: Sequence[float]) -> list[Row]:
    """Return the rows of the grid.

    Raises:
        IVONError: a τ ≤ 0, a ratio outside [0, 1], or nothing to choose between.
    """
    from .evaluate import Row

    rows = [
        Row(f"τ={tau:g}, ratio={ratio:g}", tau=tau, ratio=ratio)
        for ratio in sorted(set(ratios))
        for tau in sorted(set(taus))
    ]
    if len(rows) < 2:
        raise IVONError(
            f"{parameter('taus')} and {parameter('ratios')}: one point is nothing to choose between; "
            "give more values of either"
        )
    return rows


def sweep(evaluation: Evaluation, rows: Sequence[Row], objective: str = "nll", seed: int = 0, **options: Any) -> Sweep:
    """Evaluate the grid `rows` and choose from it; the same draws serve all points.

    The examples are split in two halves at random by `seed`, which also picks the draws. `options` are
    those of `evaluation.evaluate`.

    Raises:
        IVONError: fewer than 4 examples, or as `evaluate` does.
    """
    import torch

    from .metrics import metrics, standard_errors

    count = len(evaluation.items)
    if count < 4:
        raise IVONError(
            f"{parameter('data')}: {count} examples cannot be split in two halves; give at least 4, better 200"
        )
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    choose, report = shuffled[: count // 2], shuffled[count // 2 :]
    scores = evaluation.run(rows, seed=seed, **options)
    chosen_on = [metrics(score.of_groups(choose)) for score in scores]
    reported = [score.of_groups(report) for score in scores]
    front = pareto_front(chosen_on)
    points = [
        GridPoint(row.tau, row.ratio, chosen, metrics(other), on_front)
        for row, chosen, other, on_front in zip(rows, chosen_on, reported, front, strict=True)
    ]
    place = best(chosen_on, objective)
    held = {(row.tau, row.ratio): score for row, score in zip(rows, reported, strict=True)}
    known = {"mean": (math.inf, 0.0), "posterior": (1.0, 0.0)}
    reliability = {name: held[where] for name, where in known.items() if where in held}
    reliability[f"recommended (τ {rows[place].tau:g}, ratio {rows[place].ratio:g})"] = reported[place]
    return Sweep(points, place, objective, standard_errors(reported[place]), reliability)


def number(value: float) -> float | str:
    """Return what stands for `value` in JSON, which has no infinity."""
    return "inf" if math.isinf(value) else value
