"""Choosing temperature and pruning ratio from data: a grid, its Pareto front, and a recommendation that is honest.

The paper leaves both to the user (arXiv 2506.14280, figure 2 shows the trade-off). Here the choice is made on one half
of the data and reported on the other, so what `recommended.json` promises was not fitted to.

Beside τ goes the baseline that needs no draws, the softmax temperature T of the output. It is fitted to each point by
NLL and T's prior on the half that chooses (`metrics.calibration`); for the task "generate", to the points without
pruning, T being one of a grid, as at the end of training. `metrics.choice` has the rule.

With a risk, `abstention` finds the threshold from which on to answer. It needs examples that had no part in the choice:
half of all; the other half is halved again. Imports no torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..evaluation.evaluate import Evaluation, Sampling, check_promise
from ..evaluation.variants import Variant
from ..metrics.choice import choose
from ..metrics.verdict import FEWEST, SIGNS, Paired, examples_needed, figures, judge
from ..records.evaluation import Difference, Metrics
from ..records.recommendation import (
    DrawsPoint,
    GridPoint,
    Recommendation,
    Reported,
    Sizes,
    SweepVerdict,
)
from ..reporter import SILENT, Reporter
from .abstention import Abstention, check_risk, find_threshold, least_answers
from .conformal import check_coverage, find_set

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.encode import EncodedExample
    from ..metrics.scores import Scores

_TELLING = 100  # examples on each part, below which the user is warned


def pareto_front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Say of every point's costs, equally many each, whether no other point has none larger and one smaller."""
    return [
        not any(other != own and all(x <= y for x, y in zip(other, own, strict=True)) for other in costs)
        for own in costs
    ]


def rank(value: Metrics, objective: str) -> tuple[float, float]:
    """Return what sorts metrics by `objective`, the best first; NLL decides between equals."""
    return SIGNS[objective] * (value.value(objective) or 0.0), value.nll or 0.0


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        recommendation: what recommended.json says of it; the facts of the run, such as the adapter, are left out.
        recommended: the point of its grid, or at a softmax temperature: the best by the objective on the part of the
            data that chooses, or what is kept in its place (`metrics.choice`).
        reliability: scores on the part that reports, by name: of the mean and the posterior as they are, where the
            grid has them, and of the recommended point.
        abstention: the threshold that was found for a risk.
    """

    recommendation: Recommendation
    recommended: GridPoint
    reliability: dict[str, Scores]
    abstention: Abstention | None = None


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


def sweep(
    evaluation: Evaluation,
    variants: Sequence[Variant],
    objective: str = "nll",
    sampling: Sampling = Sampling(),
    *,
    risk: float | None = None,
    confidence: float = 0.9,
    coverage: float | None = None,
    reporter: Reporter = SILENT,
) -> Sweep:
    """Evaluate the grid `variants` of `check_grid` and choose from it; the same draws serve all points.

    The examples are split at random by the seed, which also picks the draws. The reporter is notified of what limits
    the result.

    Args:
        risk, confidence: find the threshold above which at most this share of the answers is wrong, with this
            probability.
        coverage: find the probability from which on labels are in a set that holds the right one so often.

    Raises:
        IVONError: fewer than 4 examples (8 with a risk or a coverage), either for the task "generate", or as `evaluate`
            does.
    """
    if risk is not None:
        check_risk(risk, confidence)
    if coverage is not None:
        check_coverage(coverage)
    check_promise(evaluation.task, risk=risk, coverage=coverage)
    import torch

    from ..metrics.bootstrap import standard_errors

    choosing, report, test = _split(len(evaluation.items), sampling.seed, (risk, coverage) != (None, None))
    if len(report) < _TELLING:
        reporter.notify(
            f"only {len(choosing)} examples choose and {len(report)} report: most differences will be noise; "
            f"{_TELLING} each are better"
        )
    if risk is not None and len(test) < (least := least_answers(risk, confidence)):
        reporter.notify(
            f"no threshold can promise a risk of {risk:g} from {len(test)} examples; give at least {2 * least}, "
            f"{least} of them for this test"
        )
    scaled: list[Variant] = []
    if evaluation.task == "generate":
        from ..metrics.calibration import TEMPERATURE_GRID

        scaled = [replace(v, temperature=t) for v in variants if not v.ratio for t in TEMPERATURE_GRID]
    scores = evaluation.run([*variants, *scaled], sampling, reporter)
    tempered = list(zip(scaled, scores[len(variants) :], strict=True))
    choice = _Choice(variants, scores[: len(variants)], evaluation.items, objective, choosing, report, tempered)
    leader, recommended, verdict = choice.recommend()
    abstention = None
    if risk is not None:
        held = recommended.scores
        tested = torch.isin(held.group, test)
        parts = [column[part].numpy() for part in (tested, ~tested) for column in (held.confidence, held.correct)]
        abstention = find_threshold(*parts, risk=risk, confidence=confidence)
    sets: dict[str, Any] = {}
    if coverage is not None:
        held = recommended.scores
        assert held.probabilities is not None
        target = torch.tensor([item.targets[0] for item in evaluation.items])[held.group]
        places = [torch.isin(held.group, part) for part in (test, report)]
        columns = [column[place].numpy() for place in places for column in (held.probabilities, target)]
        sets["prediction_set"] = find_set(*columns, coverage=coverage)
    point = recommended.point
    recommendation = Recommendation(
        tau=point.tau,
        ratio=point.ratio,
        temperature=point.temperature,
        objective=objective,
        score="probability",
        **(abstention.document() if abstention else {}),
        **sets,
        examples=Sizes(chosen_on=len(choosing), reported_on=len(report)),
        chosen_on=point.chosen_on,
        reported_on=Reported.model_validate({**point.reported_on.dump(), "se": standard_errors(recommended.reported)}),
        mean_reported_on=choice.mean.point.reported_on,
        mean_confidence=None if scaled else min(float(recommended.reported.confidence.mean()), 1.0),
        verdict=verdict,
        best=leader.point,
        grid=[candidate.point for candidate in choice.grid],
        scaled=[candidate.point for candidate in choice.scaled],
        draws=choice.draws(point.ratio),
    )
    return Sweep(recommendation, point, choice.reliability(recommended), abstention)


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
    """A point with the scores of all examples, and of those that report."""

    point: GridPoint
    scores: Scores
    reported: Scores

    @property
    def is_mean(self) -> bool:
        return not self.is_average and not self.point.ratio

    @property
    def is_average(self) -> bool:
        return math.isfinite(self.point.tau)


class _Choice:
    """The candidates of a sweep, and the choice from them.

    For the task "generate", `tempered` has the points without pruning at softmax temperatures, those of one together.

    Attributes:
        grid: the points as they are.
        scaled: the mean, the best draws without pruning and the best of the grid, each at the softmax temperature that
            is fitted to it on the part that chooses.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        scores: Sequence[Scores],
        items: Sequence[EncodedExample],
        objective: str,
        choosing: Tensor,
        report: Tensor,
        tempered: Sequence[tuple[Variant, Scores]] = (),
    ) -> None:
        self._objective, self._choosing, self._report, self._count = objective, choosing, report, len(items)
        chosen_on = [_metrics(score.of_groups(choosing)) for score in scores]
        front = pareto_front([(-(on.accuracy or 0.0), on.ece or 0.0) for on in chosen_on])
        self.grid = [self._candidate(*each) for each in zip(variants, scores, front, strict=True)]
        self.mean = next(candidate for candidate in self.grid if candidate.is_mean)
        self._target = None if tempered else _targets(self.mean.scores.group, items)
        self._tempered = tempered
        self._scaled = [self._candidate(*each) for each in self._scale(self.grid, choosing)]
        means = [c for c in self._scaled if c.is_mean]
        draws = [c for c in self._scaled if c.is_average and not c.point.ratio]
        self.scaled = list(dict.fromkeys(self._best(group) for group in (means, draws, self._scaled) if group))

    def _candidate(self, variant: Variant, scores: Scores, front: bool = False) -> _Candidate:
        reported = scores.of_groups(self._report)
        point = GridPoint(
            tau=variant.tau,
            ratio=variant.ratio,
            chosen_on=_metrics(scores.of_groups(self._choosing)),
            reported_on=_metrics(reported),
            front=front,
            temperature=variant.temperature,
        )
        return _Candidate(point, scores, reported)

    def _cost(self, candidate: _Candidate) -> tuple[float, float]:
        return rank(candidate.point.chosen_on, self._objective)

    def _best(self, candidates: Sequence[_Candidate]) -> _Candidate:
        return min(candidates, key=self._cost)

    def _scale(self, candidates: Sequence[_Candidate], part: Tensor) -> list[tuple[Variant, Scores]]:
        """Return candidates at the softmax temperature that is most probable by a part of the examples.

        For the task "generate" it is one of those that were evaluated, and pruned candidates have none.
        """
        import torch

        from ..metrics.calibration import penalty, probable_temperature, scores_at

        if self._target is None:
            at = {(c.point.tau, c.point.ratio) for c in candidates}
            own = (one for one in self._tempered if (one[0].tau, one[0].ratio) in at)
            groups = itertools.groupby(own, lambda one: one[0].source)

            def cost(one: tuple[Variant, Scores]) -> float:
                return float(one[1].of_groups(part).nll.sum()) + penalty(one[0].temperature)

            return [min(group, key=cost) for _, group in groups]
        scaled = []
        for candidate in candidates:
            probabilities, group = candidate.scores.probabilities, candidate.scores.group
            assert probabilities is not None
            mask = torch.isin(group, part)
            temperature = probable_temperature(probabilities[mask], self._target[mask])
            scores = scores_at(temperature, probabilities, self._target, group, candidate.is_average)
            variant = Variant("scaled", candidate.point.tau, candidate.point.ratio, temperature=temperature)
            scaled.append((variant, scores))
        return scaled

    def _crossed(self) -> float:
        """Return the nats that a T adds to the mean's NLL, cross-validated; 0 of few examples."""
        import torch

        from ..metrics.calibration import added_by_a_temperature, logs_of, nll_at_temperatures

        if len(self._report) < FEWEST:
            return 0.0
        if self._target is None:
            of_mean = [scores for variant, scores in self._tempered if math.isinf(variant.tau)]
            group, nll = of_mean[0].group, torch.stack([scores.nll for scores in of_mean], 1).double()
        else:
            group, probabilities = self.mean.scores.group, self.mean.scores.probabilities
            assert probabilities is not None
            nll = nll_at_temperatures(logs_of(probabilities), self._target[:, None]).squeeze(1)
        sums = torch.zeros(self._count, nll.shape[1], dtype=nll.dtype).index_add_(0, group, nll)
        losses = sums[torch.cat([self._choosing, self._report])]
        return added_by_a_temperature(losses.numpy())

    def recommend(self) -> tuple[_Candidate, _Candidate, SweepVerdict]:
        """Return the best candidate, the one that is recommended, and why."""
        mean, compared = self.mean, functools.cache(self._versus)
        means, others = ([c for c in [*self.grid, *self.scaled] if c.is_mean is wanted] for wanted in (True, False))
        choice = choose(mean, means, others, self._cost, lambda one, other: compared(one, other)[1], self._crossed())
        leader, recommended = choice.best, choice.recommended
        edges = _edges(leader.point, [candidate.point for candidate in self.grid])
        outcome, needed, versus = "the mean", None, dict[str, Paired]()
        text = "the mean is best: keep the default, the mean"
        if leader is mean and recommended is not mean:
            versus, outcome = compared(recommended, mean)
            named = recommended.point.describe()
            text = f"the mean is best where points are chosen, but by cross-validation a T helps: take {named}"
        elif leader is not mean:
            versus, outcome = compared(leader, mean)
            meaning = f"{outcome} than the mean" if outcome in ("better", "worse") else outcome
            if recommended is not leader:
                own = f", but beyond noise not than {choice.scaled.point.describe()}" if outcome == "better" else ""
                take = "keep the default, the mean" if recommended is mean else f"take {recommended.point.describe()}"
                why = ", and by cross-validation no T helps" if recommended is mean and leader.is_mean else ""
                meaning += f"{own}{why}: {take}"
            if recommended is leader and outcome != "better":
                meaning += f"; but T costs nothing, and by cross-validation it helps: take {leader.point.describe()}"
            elif outcome == "within noise" and not leader.is_mean:
                needed = examples_needed(self._count, *versus[self._objective])
                meaning += f"; {f'about {needed:,}' if needed else 'no number of'} examples would tell"
            at = f", at the edge of the grid ({', '.join(edges)}): try values beyond" if edges else ""
            text = (
                f"best by {self._objective}: {leader.point.describe()}{at}; on the other examples, against the mean: "
                f"{figures(versus)}: {meaning}"
            )
        paired = {metric: Difference(**each._asdict()) for metric, each in versus.items()}
        verdict = SweepVerdict(differences=paired, outcome=outcome, edges=edges, examples_needed=needed, text=text)
        return leader, recommended, verdict

    def draws(self, ratio: float) -> DrawsPoint | None:
        """Return the best draws with this pruning ratio."""
        draws = [c for c in [*self.grid, *self._scaled] if c.is_average and c.point.ratio == ratio]
        if not draws:
            return None
        point = self._best(draws).point
        return DrawsPoint(tau=point.tau, temperature=point.temperature)

    def _versus(self, candidate: _Candidate, other: _Candidate) -> tuple[dict[str, Paired], str]:
        """Return the paired differences of all metrics on the part that reports, and the outcome by the objective."""
        from ..metrics.bootstrap import compare

        versus = compare(candidate.reported, other.reported)
        return versus, judge(*versus[self._objective], len(self._report), SIGNS[self._objective])

    def reliability(self, recommended: _Candidate) -> dict[str, Scores]:
        """Return the scores of mean, posterior and recommended candidate on the part that reports, by name."""
        named = {"mean": self.mean}
        posterior = next((one for one in self.grid if (one.point.tau, one.point.ratio) == (1, 0)), None)
        named |= {"posterior": posterior} if posterior else {}
        named[f"recommended ({recommended.point.describe()})"] = recommended
        return {name: candidate.reported for name, candidate in named.items()}


def _targets(group: Tensor, items: Sequence[EncodedExample]) -> Tensor:
    """Return the right label of each score, by the example that it is of."""
    import torch

    return torch.tensor([items[number].targets[0] for number in group.tolist()])


def _metrics(scores: Scores) -> Metrics:
    from ..metrics.scores import metrics

    values: dict[str, Any] = metrics(scores)
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
