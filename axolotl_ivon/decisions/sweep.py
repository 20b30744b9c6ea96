"""Choosing temperature and pruning ratio from data: a grid, its Pareto front, and a recommendation that is honest.

The paper leaves both to the user (arXiv 2506.14280, figure 2 shows the trade-off). Here the choice is made on one half
of the data and reported on the other, so what `recommended.json` promises was not fitted to. The default is the mean:
one pass, and no choice. What was best is recommended if on the other half it is better than the mean beyond noise.

Beside τ goes the baseline that needs no draws, the softmax temperature T of the output, fitted to each point by NLL on
the half that chooses (`calibration`). Draws that are not better than the mean at its own T, beyond noise, give way to
it.

With a risk, `abstain` finds the threshold from which on to answer. It needs examples that had no part in the choice:
half of all; the other half is halved again.

Importing this module imports no torch: the commands that only read a recommendation stay quick.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..metrics.verdict import differences, examples_needed
from ..posterior.adapter import UNPRUNED
from ..records.recommendation import Recommendation
from ..storage.atomic import new_file
from ..storage.format import read_json, write_json
from .abstention import Abstention, check_risk, find_threshold

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.encode import EncodedExample
    from ..evaluation.evaluate import Evaluation, Variant
    from ..metrics.scores import Scores

_TELLING = 100  # examples on each part, below which the user is warned
FEWEST = 30  # examples below which a standard error says little, and nothing is recommended
LIKELY = 2.0  # standard errors from zero that are no noise
LABELS = {"nll": "NLL", "accuracy": "accuracy", "ece": "ECE"}
_FIGURES = {"nll": (1, 3, ""), "accuracy": (100, 1, " %"), "ece": (100, 1, " %")}
# What an objective makes small.
OBJECTIVES = {"nll": 1, "ece": 1, "accuracy": -1, "brier": 1}
RECOMMENDED_FILE = "recommended.json"


def read_recommended(path: str | Path, header: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Return (τ, pruning ratio) from the file that `ivon-post sweep` wrote.

    With the `header` of an adapter's ivon_sigma.safetensors they are what makes of this adapter the posterior that was
    evaluated: it must be the adapter of the sweep, or made of it by `temper` and `prune`, whose τ is not applied twice.

    Raises:
        IVONError: the file cannot be read, is not such a file, holds a τ ≤ 0 or a ratio outside [0, 1], or belongs to
            another adapter.
    """
    named, fix = param_ref("recommended"), "give the recommended.json that `ivon-post sweep` wrote"
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
    swept = math.inf if facts.get("adapter_tau") == "inf" else facts.get("adapter_tau", 1.0)
    if not _is_number(swept) or not swept > 0:
        raise IVONError(f'{named} {path}: adapter_tau is {facts["adapter_tau"]!r}; it must be a number > 0, or "inf"')
    if header is None:
        return float(tau), float(ratio)
    found = facts.get("mean_sha256")
    if found is not None and found not in (header.get("mean_sha256"), header.get(UNPRUNED)):
        raise IVONError(
            f"{named} {path} was chosen for another adapter (mean_sha256 differs); run `ivon-post sweep` on this one, "
            f"or give {param_ref('tau')} and {param_ref('ratio')}"
        )
    own, pruned = float(header.get("tau", 1)), float(header.get("pruned_ratio", 0))
    if found is not None and found == header.get(UNPRUNED) and pruned > ratio:
        raise IVONError(
            f"{named} {path}: its ratio is {ratio:g}, and {pruned:g} of this adapter are pruned already; use the one "
            "that was swept"
        )
    whole = float(tau) * swept
    if math.isinf(own) and math.isfinite(whole):
        raise IVONError(f"{named} {path}: its tau is {whole:g}, and this adapter is the mean alone; use the one swept")
    return (math.inf if math.isinf(whole) else whole / own), float(ratio)


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
    named, facts = param_ref("recommended"), read_json(Path(path))
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
    """One (τ, ratio), and one softmax temperature, with its metrics on what chooses and on what reports."""

    tau: float
    ratio: float
    chosen_on: dict[str, Any]
    reported_on: dict[str, Any]
    front: bool
    temperature: float = 1.0

    def describe(self) -> str:
        """Return the point in words."""
        scaled = "" if self.temperature == 1 else f", temperature {self.temperature:.3g}"
        return f"τ {self.tau:g}, ratio {self.ratio:g}{scaled}"


@dataclass(frozen=True)
class Verdict:
    """Whether the best point is better than the mean, on the examples that report.

    Attributes:
        differences: of each metric, best − mean: `difference` and `standard_error`, paired; empty if it is the mean.
        outcome: "better", "worse", "within noise", "too few examples", or "the mean" where that was the best.
        edges: the coordinates of the best point that lie at the edge of the grid, where better ones may lie beyond.
        examples_needed: about how many examples in all would tell such a difference; None unless it is within noise.
        text: all of it in a line.
    """

    differences: dict[str, dict[str, float | None]]
    outcome: str
    edges: list[str]
    examples_needed: int | None
    text: str


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        points: the grid, ratio by ratio, τ ascending.
        scaled: the mean, and the best of the grid, each at its own softmax temperature; empty without probabilities.
        best: what is best by `objective` on the part of the data that chooses.
        recommended: `best`, or what is kept in its place because it is not better beyond noise.
        verdict: why.
        examples: how many examples choose, and how many report.
        error: bootstrap standard errors of the recommended point's metrics on the part that reports.
        reliability: scores on the part that reports, by name: of the mean and the posterior as they are, where the
            grid has them, and of the recommended point.
        abstention: the threshold that was found for a risk.
    """

    points: list[GridPoint]
    scaled: list[GridPoint]
    best: GridPoint
    recommended: GridPoint
    objective: str
    verdict: Verdict
    examples: tuple[int, int]
    error: dict[str, float | None]
    reliability: dict[str, Scores]
    abstention: Abstention | None = None

    def find(self, tau: float, ratio: float) -> GridPoint | None:
        """Return the grid point, or None."""
        return next((p for p in self.points if (p.tau, p.ratio) == (tau, ratio)), None)

    @property
    def mean(self) -> GridPoint:
        """The mean, unpruned: what the others are held against."""
        return next(p for p in self.points if (p.tau, p.ratio) == (math.inf, 0))

    def record(self, facts: Mapping[str, Any]) -> Recommendation:
        """Return what recommended.json says of it, with `facts` about the run."""
        point = self.recommended
        document = {
            "tau": number(point.tau),
            "ratio": point.ratio,
            "temperature": point.temperature,
            "objective": self.objective,
            "score": "probability",
            **(self.abstention.document() if self.abstention else {}),
            **facts,
            "examples": dict(zip(("chosen_on", "reported_on"), self.examples, strict=True)),
            "chosen_on": point.chosen_on,
            "reported_on": {**point.reported_on, "se": self.error},
            "mean_reported_on": self.mean.reported_on,
            "verdict": asdict(self.verdict),
            **{
                name: [{**asdict(point), "tau": number(point.tau)} for point in points]
                for name, points in {"best": [self.best], "grid": self.points, "scaled": self.scaled}.items()
            },
        }
        document["best"] = document["best"][0]
        return Recommendation.parse(document, "the sweep")


def check_grid(taus: Sequence[float], ratios: Sequence[float]) -> list[Variant]:
    """Return the rows of the grid, and the mean in any case.

    Raises:
        IVONError: a τ ≤ 0, a ratio outside [0, 1], or nothing to choose between.
    """
    from ..evaluation.evaluate import Variant

    rows = [
        Variant(f"τ={tau:g}, ratio={ratio:g}", tau=tau, ratio=ratio)
        for ratio in sorted(set(ratios))
        for tau in sorted(set(taus))
    ]
    if len(rows) < 2:
        raise IVONError(
            f"{param_ref('taus')} and {param_ref('ratios')}: one point is nothing to choose between; "
            "give more values of either"
        )
    if not any(row.tau == math.inf and row.ratio == 0 for row in rows):
        rows.append(Variant("τ=inf, ratio=0"))
    return sorted(rows, key=lambda row: (row.ratio, row.tau))


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Raise IVONError if `report.save` would refuse `folder`: worth asking before the evaluation."""
    if folder.exists() and not folder.is_dir():
        raise IVONError(f"{folder} is not a folder; choose another name with {param_ref('output')}")
    if (folder / RECOMMENDED_FILE).exists() and not overwrite:
        raise IVONError(
            f"{folder} holds a sweep; choose another name with {param_ref('output')}, or overwrite it "
            f"with {param_ref('overwrite')}"
        )
    parent = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        raise IVONError(
            f"{folder} cannot be written (no permission for {parent}); choose another name with {param_ref('output')}"
        )


def sweep(
    evaluation: Evaluation,
    rows: Sequence[Variant],
    objective: str = "nll",
    seed: int = 0,
    *,
    risk: float | None = None,
    confidence: float = 0.9,
    notify: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Sweep:
    """Evaluate the grid `rows` of `check_grid` and choose from it; the same draws serve all points.

    The examples are split at random by `seed`, which also picks the draws. `notify` is told what limits the result;
    `options` are those of `evaluation.evaluate`.

    Args:
        risk, confidence: find the threshold above which at most this share of the answers is wrong, with this
            probability.

    Raises:
        IVONError: fewer than 4 examples (8 with a risk), a risk for the task "generate", or as `evaluate` does.
    """
    from ..metrics.scores import standard_errors

    count = len(evaluation.items)
    if risk is not None:
        check_risk(risk, confidence)
        if evaluation.task == "generate":
            raise IVONError(
                f"{param_ref('risk')} {risk:g}: the task generate scores tokens, and a promise is about answers; "
                "generate them, and use `ivon-post mbr --risk`"
            )
    least, parts = (4, "two halves") if risk is None else (8, "a half and two quarters")
    if count < least:
        raise IVONError(
            f"{param_ref('data')}: {count} examples cannot be split in {parts}; give at least {least}, better 200"
        )
    choose, report, test = _split(count, seed, risk is not None)
    if len(report) < _TELLING:
        notify(
            f"{len(choose)} examples choose and {len(report)} report: few differences are more than noise; "
            f"{_TELLING} each are better"
        )
    scores = evaluation.run(rows, seed=seed, notify=notify, **options)
    grid = [_Candidate.of(row, score, choose, report) for row, score in zip(rows, scores, strict=True)]
    front = pareto_front([one.point.chosen_on for one in grid])
    grid = [replace(one, point=replace(one.point, front=mark)) for one, mark in zip(grid, front, strict=True)]
    mean = next(one for one in grid if one.is_mean)
    scaled = _scale(grid, mean, evaluation.items, objective, choose, report)
    leader, recommended, verdict = _recommend(grid, scaled, mean, objective, report, count)
    abstention = None
    if risk is not None:
        import torch

        of_test = recommended.scores.of_groups(test)
        guide = recommended.scores.of_groups(torch.cat([choose, report]))
        columns = [getattr(part, name).numpy() for part in (of_test, guide) for name in ("confidence", "correct")]
        abstention = find_threshold(*columns, risk=risk, confidence=confidence)
    named = {"mean": mean}
    named |= {"posterior": one for one in grid if (one.point.tau, one.point.ratio) == (1, 0)}  # noqa: B035
    named[f"recommended ({recommended.point.describe()})"] = recommended
    reliability = {name: one.scores.of_groups(report) for name, one in named.items()}
    return Sweep(
        [one.point for one in grid],
        [one.point for one in scaled],
        leader.point,
        recommended.point,
        objective,
        verdict,
        (len(choose), len(report)),
        standard_errors(recommended.scores.of_groups(report)),
        reliability,
        abstention,
    )


def _split(count: int, seed: int, certify: bool) -> Sequence[Tensor]:
    """Return the numbers of the examples that choose, that report, and that certify a threshold (or none)."""
    import torch

    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = count // 2 if certify else count
    return shuffled.split([first // 2, first - first // 2, count - first])


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A point with the scores of all examples."""

    point: GridPoint
    scores: Scores

    @classmethod
    def of(
        cls, row: Variant | GridPoint, scores: Scores, choose: Tensor, report: Tensor, temperature: float = 1.0
    ) -> _Candidate:
        from ..metrics.scores import metrics

        chosen_on, reported_on = (metrics(scores.of_groups(part)) for part in (choose, report))
        return cls(GridPoint(row.tau, row.ratio, chosen_on, reported_on, False, temperature), scores)

    @property
    def is_mean(self) -> bool:
        return math.isinf(self.point.tau) and not self.point.ratio


def _scale(
    grid: Sequence[_Candidate],
    mean: _Candidate,
    items: Sequence[EncodedExample],
    objective: str,
    choose: Tensor,
    report: Tensor,
) -> list[_Candidate]:
    """Return the mean, and what is best of the grid, at softmax temperatures fitted on the part that chooses."""
    import torch

    from ..metrics.scores import Scores
    from ..metrics.temperature import fit_temperature, rescale

    if mean.scores.probabilities is None:  # all tokens of a vocabulary, which nobody keeps
        return []
    target = torch.tensor([items[group].targets[0] for group in mean.scores.group.tolist()])
    mask = torch.isin(mean.scores.group, choose)
    found = []
    for one in grid:
        probabilities = one.scores.probabilities
        assert probabilities is not None
        temperature = fit_temperature(probabilities[mask], target[mask])
        unknown = None if math.isinf(one.point.tau) else torch.full_like(one.scores.entropy, math.nan)
        scores = Scores.of(rescale(probabilities, temperature), target, unknown, one.scores.group, unknown, keep=True)
        found.append(_Candidate.of(one.point, scores, choose, report, temperature))
    winner = found[best([one.point.chosen_on for one in found], objective)]
    baseline = found[grid.index(mean)]
    return [baseline] if winner is baseline else [baseline, winner]


def _recommend(
    grid: Sequence[_Candidate],
    scaled: Sequence[_Candidate],
    mean: _Candidate,
    objective: str,
    report: Tensor,
    count: int,
) -> tuple[_Candidate, _Candidate, Verdict]:
    """Return what is best on the part that chooses, what is recommended, and why."""
    candidates = [*grid, *scaled]
    leader = candidates[best([one.point.chosen_on for one in candidates], objective)]
    edges = _edges(leader.point, [one.point for one in grid])
    if leader is mean:
        return leader, mean, Verdict({}, "the mean", edges, None, "the mean is best: keep the default, the mean")

    def better(one: _Candidate, other: _Candidate) -> bool:
        return _outcome(_versus(one, other, report), objective, len(report)) == "better"

    versus = _versus(leader, mean, report)
    outcome = _outcome(versus, objective, len(report))
    recommended, needed = leader if outcome == "better" else mean, None
    baseline = scaled[0] if scaled else mean
    # Draws cost passes: they must be better than what costs none, where that is any good.
    if outcome == "better" and not leader.is_mean and baseline is not mean and better(baseline, mean):
        recommended = leader if better(leader, baseline) else baseline
    told = {"better": "better than the mean", "worse": "worse than the mean: keep the default, the mean"}.get(
        outcome, f"{outcome}: keep the default, the mean"
    )
    if recommended is baseline is not mean and leader is not baseline:
        told += (
            f", but not than the mean at a softmax temperature, beyond noise: take that, {baseline.point.describe()}"
        )
    if outcome == "within noise":
        own = versus[objective]
        needed = examples_needed(count, own["difference"] or 0.0, own["standard_error"] or 0.0)
        told += f"; about {needed:,} examples would tell" if needed else "; no number of examples would tell"
    figures = ", ".join(
        f"{LABELS[name]} {scale * (versus[name]['difference'] or 0):+.{digits}f} ± "
        f"{scale * (versus[name]['standard_error'] or 0):.{digits}f}{unit}"
        for name, (scale, digits, unit) in _FIGURES.items()
        if name in versus
    ).replace("-", "−")
    at = f", at the edge of the grid ({', '.join(edges)}): try values beyond" if edges else ""
    chosen = f"best by {objective}: {leader.point.describe()}{at}"
    text = f"{chosen}; on the other examples, against the mean: {figures}: {told}"
    return leader, recommended, Verdict(versus, outcome, edges, needed, text)


def _versus(one: _Candidate, other: _Candidate, report: Tensor) -> dict[str, dict[str, float | None]]:
    """Return the paired differences of all metrics on the part that reports."""
    from ..metrics.scores import bootstrap

    resamples = [bootstrap(candidate.scores.of_groups(report)) for candidate in (one, other)]
    return differences(one.point.reported_on, other.point.reported_on, *resamples)


def _outcome(versus: Mapping[str, Mapping[str, float | None]], objective: str, examples: int) -> str:
    """Return whether a difference is one: "better" or "worse" beyond noise, "within noise", "too few examples"."""
    difference, error = versus[objective]["difference"] or 0.0, versus[objective]["standard_error"] or 0.0
    if examples < FEWEST:
        return "too few examples"
    if not difference or abs(difference) < LIKELY * error:
        return "within noise"
    return "better" if OBJECTIVES[objective] * difference < 0 else "worse"


def _edges(point: GridPoint, grid: Sequence[GridPoint]) -> list[str]:
    """Return which coordinates are the least or largest of the grid, though there are values beyond."""
    taus, ratios = sorted({one.tau for one in grid}), sorted({one.ratio for one in grid})
    found = []
    if math.isfinite(point.tau) and point.tau in (taus[0], taus[-1]):
        found.append(f"τ {point.tau:g}")
    if point.ratio and point.ratio in (ratios[0], ratios[-1]):
        found.append(f"ratio {point.ratio:g}")
    return found


def number(value: float) -> float | str:
    """Return what stands for `value` in JSON, which has no infinity."""
    return "inf" if math.isinf(value) else value
