"""Choosing temperature and pruning ratio from data: a grid, its Pareto front, and a recommendation that is honest.

The paper leaves both to the user (arXiv 2506.14280, figure 2 shows the trade-off). Here the choice is made on one half
of the data and reported on the other, so what `recommended.json` promises was not fitted to. The default is the mean:
one pass, and no choice. The best point is recommended if it is better than the mean on the other half, beyond noise.

Beside τ goes the baseline that needs no draws, the softmax temperature T of the output. It is fitted to each point by
NLL on the half that chooses (`metrics.calibration`). Draws must be better than the mean at its own T, beyond noise, or
that is recommended.

With a risk, `abstention` finds the threshold from which on to answer. It needs examples that had no part in the choice:
half of all; the other half is halved again.

Importing this module imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..evaluation.evaluate import Evaluation, Sampling
from ..evaluation.variants import Variant
from ..metrics.verdict import SIGNS, differences, examples_needed, figures, judge
from ..records.evaluation import Difference, Metrics
from ..records.recommendation import RECOMMENDED_FILE, GridPoint, Recommendation, Reported, Sizes, SweepVerdict
from ..reporter import SILENT, Reporter
from .abstention import Abstention, check_risk, find_threshold

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.encode import EncodedExample
    from ..metrics.scores import Scores

_TELLING = 100  # examples on each part, below which the user is warned


def pareto_front(values: Sequence[Metrics]) -> list[bool]:
    """Say of every point's metrics whether no other has as good an accuracy and ECE, and one of them better."""
    places = [(-(value.accuracy or 0.0), value.ece or 0.0) for value in values]
    return [
        not any(other[0] <= place[0] and other[1] <= place[1] and other != place for other in places)
        for place in places
    ]


def best(values: Sequence[Metrics], objective: str) -> int:
    """Return the place of the best metrics by `objective`; NLL decides between equals, then the earlier place."""

    def cost(value: Metrics) -> tuple[float, float]:
        return SIGNS[objective] * (value.value(objective) or 0.0), value.nll or 0.0

    return min(range(len(values)), key=lambda place: cost(values[place]))


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
    verdict: SweepVerdict
    examples: tuple[int, int]
    error: Metrics
    reliability: dict[str, Scores]
    abstention: Abstention | None = None

    @property
    def mean(self) -> GridPoint:
        """The mean, unpruned: what the others are compared with."""
        return next(p for p in self.points if (p.tau, p.ratio) == (math.inf, 0))

    def record(self, facts: Mapping[str, Any]) -> Recommendation:
        """Return what recommended.json says of it, with `facts` about the run: further fields of `Recommendation`."""
        point = self.recommended
        return Recommendation(
            tau=point.tau,
            ratio=point.ratio,
            temperature=point.temperature,
            objective=self.objective,
            score="probability",
            **(self.abstention.document() if self.abstention else {}),
            **facts,
            examples=Sizes(chosen_on=self.examples[0], reported_on=self.examples[1]),
            chosen_on=point.chosen_on,
            reported_on=Reported.model_validate({**point.reported_on.dump(), "se": self.error}),
            mean_reported_on=self.mean.reported_on,
            verdict=self.verdict,
            best=self.best,
            grid=self.points,
            scaled=self.scaled,
        )


def check_grid(taus: Sequence[float], ratios: Sequence[float]) -> list[Variant]:
    """Return the variants of the grid, and the mean in any case.

    Raises:
        IVONError: a τ ≤ 0, a ratio outside [0, 1], or nothing to choose between.
    """
    variants = [Variant("grid", tau=tau, ratio=ratio) for ratio in set(ratios) for tau in set(taus)]
    if len(variants) < 2:
        raise IVONError(
            f"{param_ref('taus')} and {param_ref('ratios')}: one point is nothing to choose between; "
            "give more values of either"
        )
    return sorted({*variants, Variant("grid")}, key=lambda variant: (variant.ratio, variant.tau))


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Raise IVONError if no sweep can be written to `folder`: worth asking before the evaluation."""
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
    variants: Sequence[Variant],
    objective: str = "nll",
    sampling: Sampling = Sampling(),
    *,
    risk: float | None = None,
    confidence: float = 0.9,
    reporter: Reporter = SILENT,
) -> Sweep:
    """Evaluate the grid `variants` of `check_grid` and choose from it; the same draws serve all points.

    The examples are split at random by the seed, which also picks the draws. The reporter is notified of what limits
    the result.

    Args:
        risk, confidence: find the threshold above which at most this share of the answers is wrong, with this
            probability.

    Raises:
        IVONError: fewer than 4 examples (8 with a risk), a risk for the task "generate", or as `evaluate` does.
    """
    if risk is not None:
        check_risk(risk, confidence)
        if evaluation.task == "generate":
            raise IVONError(
                f"{param_ref('risk')} {risk:g}: the task generate scores tokens, and a promise is about answers; "
                "generate them, and use `ivon-post mbr --risk`"
            )
    parts = _split(len(evaluation.items), sampling.seed, risk is not None)
    choose, report, test = parts
    if len(report) < _TELLING:
        reporter.notify(
            f"{len(choose)} examples choose and {len(report)} report: few differences are more than noise; "
            f"{_TELLING} each are better"
        )
    scores = evaluation.run(variants, sampling, reporter)
    choice = _Choice(variants, scores, evaluation.items, objective, choose, report)
    leader, recommended, verdict = choice.recommend()
    abstention = None
    if risk is not None:
        import torch

        of_test = recommended.scores.of_groups(test)
        guide = recommended.scores.of_groups(torch.cat([choose, report]))
        columns = [getattr(part, name).numpy() for part in (of_test, guide) for name in ("confidence", "correct")]
        abstention = find_threshold(*columns, risk=risk, confidence=confidence)
    return Sweep(
        [candidate.point for candidate in choice.grid],
        [candidate.point for candidate in choice.scaled],
        leader.point,
        recommended.point,
        objective,
        verdict,
        (len(choose), len(report)),
        choice.error(recommended),
        choice.reliability(recommended),
        abstention,
    )


def _split(count: int, seed: int, certify: bool) -> Sequence[Tensor]:
    """Return the numbers of the examples that choose, that report, and that certify a threshold (or none)."""
    import torch

    least, parts = (8, "a half and two quarters") if certify else (4, "two halves")
    if count < least:
        raise IVONError(
            f"{param_ref('data')}: {count} examples cannot be split in {parts}; give at least {least}, better 200"
        )
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = count // 2 if certify else count
    return shuffled.split([first // 2, first - first // 2, count - first])


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A point with the scores of all examples."""

    point: GridPoint
    scores: Scores

    @property
    def is_mean(self) -> bool:
        return math.isinf(self.point.tau) and not self.point.ratio


class _Choice:
    """The candidates of a sweep, and the choice from them.

    Attributes:
        grid: the points as they are.
        scaled: the mean and the best of the grid at softmax temperatures that are fitted on the part that chooses.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        scores: Sequence[Scores],
        items: Sequence[EncodedExample],
        objective: str,
        choose: Tensor,
        report: Tensor,
    ) -> None:
        self._objective, self._choose, self._report, self._count = objective, choose, report, len(items)
        pairs = list(zip(variants, scores, strict=True))
        front = pareto_front([_metrics(score, choose) for score in scores])
        self.grid = [self._candidate(v, score, front=mark) for (v, score), mark in zip(pairs, front, strict=True)]
        self.mean = next(candidate for candidate in self.grid if candidate.is_mean)
        self.scaled = self._scale(items)

    def _candidate(
        self, variant: Variant | GridPoint, scores: Scores, temperature: float = 1.0, front: bool = False
    ) -> _Candidate:
        chosen_on, reported_on = _metrics(scores, self._choose), _metrics(scores, self._report)
        point = GridPoint(
            tau=variant.tau, ratio=variant.ratio, chosen_on=chosen_on, reported_on=reported_on, front=front,
            temperature=temperature,
        )  # fmt: skip
        return _Candidate(point, scores)

    def _best(self, candidates: Sequence[_Candidate]) -> _Candidate:
        return candidates[best([candidate.point.chosen_on for candidate in candidates], self._objective)]

    def _scale(self, items: Sequence[EncodedExample]) -> list[_Candidate]:
        import torch

        from ..metrics.calibration import fit_temperature, rescale
        from ..metrics.scores import Scores

        if self.mean.scores.probabilities is None:  # all tokens of a vocabulary, which nobody keeps
            return []
        group = self.mean.scores.group
        target = torch.tensor([items[number].targets[0] for number in group.tolist()])
        mask = torch.isin(group, self._choose)
        scaled = []
        for candidate in self.grid:
            probabilities = candidate.scores.probabilities
            assert probabilities is not None
            temperature = fit_temperature(probabilities[mask], target[mask])
            unknown = None if math.isinf(candidate.point.tau) else torch.full_like(candidate.scores.entropy, math.nan)
            scores = Scores.of(
                rescale(probabilities, temperature), target, unknown, candidate.scores.group, unknown, keep=True
            )
            scaled.append(self._candidate(candidate.point, scores, temperature))
        winner, baseline = self._best(scaled), scaled[self.grid.index(self.mean)]
        return [baseline] if winner is baseline else [baseline, winner]

    def recommend(self) -> tuple[_Candidate, _Candidate, SweepVerdict]:
        """Return the best candidate, the one that is recommended, and why."""
        leader, mean = self._best([*self.grid, *self.scaled]), self.mean
        edges = _edges(leader.point, [candidate.point for candidate in self.grid])
        if leader is mean:
            text = "the mean is best: keep the default, the mean"
            verdict = SweepVerdict(differences={}, outcome="the mean", edges=edges, examples_needed=None, text=text)
            return leader, mean, verdict
        versus = self._versus(leader, mean)
        outcome = self._judge(versus)
        recommended, needed = leader if outcome == "better" else mean, None
        baseline = self.scaled[0] if self.scaled else mean
        # Draws cost passes: they must be better than what costs none, where that is any good.
        if outcome == "better" and not leader.is_mean and baseline is not mean and self._is_better(baseline, mean):
            recommended = leader if self._is_better(leader, baseline) else baseline
        meaning = f"{outcome} than the mean" if outcome in ("better", "worse") else outcome
        if outcome != "better":
            meaning += ": keep the default, the mean"
        if recommended is baseline is not mean and leader is not baseline:
            meaning += (
                ", but not than the mean at a softmax temperature, beyond noise: take that, "
                f"{baseline.point.describe()}"
            )
        if outcome == "within noise":
            needed = examples_needed(self._count, *self._difference(versus))
            meaning += f"; about {needed:,} examples would tell" if needed else "; no number of examples would tell"
        at = f", at the edge of the grid ({', '.join(edges)}): try values beyond" if edges else ""
        numbers = figures({m: (v["difference"] or 0.0, v["standard_error"] or 0.0) for m, v in versus.items()})
        text = (
            f"best by {self._objective}: {leader.point.describe()}{at}; on the other examples, against the mean: "
            f"{numbers}: {meaning}"
        )
        paired = {metric: Difference(**difference) for metric, difference in versus.items()}
        verdict = SweepVerdict(differences=paired, outcome=outcome, edges=edges, examples_needed=needed, text=text)
        return leader, recommended, verdict

    def _versus(self, candidate: _Candidate, other: _Candidate) -> dict[str, dict[str, float | None]]:
        """Return the paired differences of all metrics on the part that reports."""
        from ..metrics.bootstrap import bootstrap

        resamples = [bootstrap(each.scores.of_groups(self._report)) for each in (candidate, other)]
        return differences(candidate.point.reported_on.dump(), other.point.reported_on.dump(), *resamples)

    def _difference(self, versus: Mapping[str, Mapping[str, float | None]]) -> tuple[float, float]:
        objective = versus[self._objective]
        return objective["difference"] or 0.0, objective["standard_error"] or 0.0

    def _judge(self, versus: Mapping[str, Mapping[str, float | None]]) -> str:
        return judge(*self._difference(versus), len(self._report), SIGNS[self._objective])

    def _is_better(self, candidate: _Candidate, other: _Candidate) -> bool:
        return self._judge(self._versus(candidate, other)) == "better"

    def error(self, candidate: _Candidate) -> Metrics:
        """Return the standard errors of a candidate's metrics on the part that reports."""
        from ..metrics.bootstrap import standard_errors

        return Metrics(**standard_errors(candidate.scores.of_groups(self._report)))

    def reliability(self, recommended: _Candidate) -> dict[str, Scores]:
        """Return the scores of mean, posterior and recommended candidate on the part that reports, by name."""
        named = {"mean": self.mean}
        posterior = next((one for one in self.grid if (one.point.tau, one.point.ratio) == (1, 0)), None)
        named |= {"posterior": posterior} if posterior else {}
        named[f"recommended ({recommended.point.describe()})"] = recommended
        return {name: candidate.scores.of_groups(self._report) for name, candidate in named.items()}


def _metrics(scores: Scores, examples: Tensor) -> Metrics:
    from ..metrics.scores import metrics

    values: dict[str, Any] = metrics(scores.of_groups(examples))
    return Metrics(**values)


def _edges(point: GridPoint, grid: Sequence[GridPoint]) -> list[str]:
    """Return which coordinates are the least or largest of the grid, though there are values beyond."""
    taus, ratios = sorted({other.tau for other in grid}), sorted({other.ratio for other in grid})
    edges = []
    if math.isfinite(point.tau) and point.tau in (taus[0], taus[-1]):
        edges.append(f"τ {point.tau:g}")
    if point.ratio and point.ratio in (ratios[0], ratios[-1]):
        edges.append(f"ratio {point.ratio:g}")
    return edges
