"""The grid, the front and the recommendation; what is promised is measured on data that did not choose."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_chats

from axolotl_ivon import IVONError
from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.decisions.abstention import find_threshold
from axolotl_ivon.decisions.sweep import Sweep, check_grid, pareto_front, rank, sweep
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.metrics.calibration import TEMPERATURE_GRID
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.metrics.verdict import SIGNS
from axolotl_ivon.records.evaluation import Metrics
from axolotl_ivon.records.recommendation import DrawsPoint, GridPoint, Sizes

TAUS, RATIOS = (0.3, 1.0, math.inf), (0.0, 0.4)


@pytest.fixture(scope="module")
def swept(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    data = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=31)
    return Evaluation(tiny_adapter, EvaluationData([data]))


@pytest.fixture(scope="module")
def result(swept: Evaluation) -> Sweep:
    return sweep(swept, check_grid(TAUS, RATIOS), "nll", sampling=Sampling(seed=4, samples=2))


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 4)] * n), min_size=1, max_size=8)))
def test_the_front_holds_what_nothing_beats(costs: list[tuple[int, ...]]) -> None:
    for cost, front in zip(costs, pareto_front(costs), strict=True):
        pairs = [list(zip(other, cost, strict=True)) for other in costs]
        assert front == (not any(all(x <= y for x, y in p) and any(x < y for x, y in p) for p in pairs))


@pytest.mark.parametrize(("objective", "place"), [("accuracy", 2), ("ece", 3), ("nll", 2), ("brier", 2)])
def test_the_best_is_least_or_greatest_and_nll_decides_between_equals(objective: str, place: int) -> None:
    figures = [(0.8, 0.1, 0.5), (0.9, 0.2, 0.6), (0.9, 0.3, 0.4), (0.7, 0.05, 0.9)]
    values = [Metrics(accuracy=accuracy, ece=ece, nll=nll, brier=0.0) for accuracy, ece, nll in figures]
    assert min(values, key=lambda value: rank(value, objective)) is values[place]


def test_the_choice_is_made_on_one_half_and_reported_on_the_other(swept: Evaluation, result: Sweep) -> None:
    found = result.recommendation
    assert [(p.tau, p.ratio) for p in found.grid] == [(tau, ratio) for ratio in RATIOS for tau in TAUS]
    assert found.best == min(found.grid + found.scaled, key=lambda p: p.chosen_on.nll)
    assert found.examples == Sizes(chosen_on=15, reported_on=16)
    scores = swept.run(check_grid(TAUS, RATIOS), Sampling(seed=4, samples=2))
    shuffled = torch.randperm(31, generator=torch.Generator().manual_seed(4))
    for p, score in zip(result.recommendation.grid, scores, strict=True):
        assert p.chosen_on.dump() == metrics(score.of_groups(shuffled[:15]))
        assert p.reported_on.dump() == metrics(score.of_groups(shuffled[15:]))
    costs = [(-p.chosen_on.accuracy, p.chosen_on.ece) for p in result.recommendation.grid]  # type: ignore[operator]
    assert [p.front for p in result.recommendation.grid] == pareto_front(costs)
    assert result.recommendation.reported_on.se.dump().keys() == result.recommendation.grid[0].reported_on.dump().keys()


@pytest.mark.parametrize("objective", SIGNS)
def test_every_objective_is_followed(swept: Evaluation, objective: str) -> None:
    found = sweep(swept, check_grid(TAUS, RATIOS), objective, Sampling(seed=4, samples=2)).recommendation
    values = [p.chosen_on.value(objective) for p in found.grid + found.scaled]
    assert found.best.chosen_on.value(objective) == (max(values) if objective == "accuracy" else min(values))


class Synthetic:
    """An evaluation whose averaged predictions are given: logits of two classes for each (τ, ratio)."""

    task = "choice"

    def __init__(self, logits: dict[tuple[float, float], torch.Tensor], target: torch.Tensor) -> None:
        self.logits, self.target = logits, target
        self.items = [EncodedExample([1], [0], [t], ((0,), (1,))) for t in target.tolist()]

    def run(self, rows: list[Variant], *_: object) -> list[Scores]:
        order = torch.arange(len(self.target)).flip(0)  # a real one sorts by length
        found = []
        for row in rows:
            logit = self.logits[row.tau, row.ratio][order]
            p = torch.stack([torch.zeros_like(logit), logit], 1).softmax(1)
            found.append(Scores.of(p, self.target[order], group=order, keep=True))
        return found


def questions(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the true logits of class 1, and what was drawn by them."""
    generator = torch.Generator().manual_seed(seed)
    logit = 2 * torch.randn(count, generator=generator, dtype=torch.float64)
    return logit, (torch.rand(count, generator=generator) < logit.sigmoid()).long()


GRID = [(tau, 0.0) for tau in (0.5, 1.0, 2.0, math.inf)]


def swept_over(logits: dict[tuple[float, float], torch.Tensor], target: torch.Tensor, **more: Any) -> Sweep:
    rows = check_grid([tau for tau, _ in logits], [ratio for _, ratio in logits])
    return sweep(Synthetic(logits, target), rows, **more)  # type: ignore[arg-type]


def mean(found: Sweep) -> GridPoint:
    return next(p for p in found.recommendation.grid if (p.tau, p.ratio) == (math.inf, 0))


def test_what_is_better_beyond_noise_is_recommended() -> None:
    logit, target = questions(600)
    # The mean knows nothing about half of the questions; no temperature gives that back.
    blind = logit * (torch.arange(600) % 2)
    found = swept_over({**dict.fromkeys(GRID, blind), (1.0, 0.0): logit}, target)
    assert found.recommended is found.recommendation.best
    verdict = found.recommendation.verdict
    assert (found.recommended.tau, verdict.outcome, verdict.edges) == (1.0, "better", [])
    assert "better than the mean" in verdict.text
    assert found.recommendation.draws.tau == 1.0
    shuffled = torch.randperm(600, generator=torch.Generator().manual_seed(0))[300:]
    nll = [torch.nn.functional.softplus(torch.where(target == 1, -one, one))[shuffled] for one in (logit, blind)]
    paired = nll[0] - nll[1]
    told = verdict.differences["nll"]
    assert told.difference == pytest.approx(paired.mean().item(), abs=0.02)
    assert told.standard_error == pytest.approx(paired.std().item() / 300**0.5, rel=0.15)


def test_noise_keeps_the_mean_and_says_how_many_examples_would_tell() -> None:
    logit, target = questions(400)
    noise = 0.3 * torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    heard = Heard()
    found = swept_over({**dict.fromkeys(GRID, logit), (2.0, 0.0): logit + noise}, target, reporter=heard)
    assert found.recommended is mean(found)
    assert found.recommendation.verdict.outcome in ("within noise", "the mean")
    assert heard.notes == []
    # One that is right more often where it chooses, by chance, and not where it reports.
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    lucky = logit.clone()
    lucky[shuffled[:200]] += 0.1 * (2.0 * target - 1)[shuffled[:200]]
    found = swept_over({**dict.fromkeys(GRID, logit), (0.5, 0.0): lucky + noise}, target)
    assert (found.recommendation.best.tau, found.recommended) == (0.5, mean(found))
    verdict = found.recommendation.verdict
    assert verdict.edges == ["τ 0.5"]
    assert "at the edge of the grid (τ 0.5): try values beyond" in verdict.text
    assert "within noise: keep the default, the mean" in verdict.text
    versus = verdict.differences["nll"]
    needed = 400 * (2 * versus.standard_error / versus.difference) ** 2  # type: ignore[operator]
    assert verdict.examples_needed == pytest.approx(needed, rel=0.1)
    assert f"about {verdict.examples_needed:,} examples would tell" in verdict.text


def test_a_softmax_temperature_wins_over_draws_that_do_no_more() -> None:
    logit, target = questions(800)
    # The mean is three times too sure; draws do what a temperature of 3 does, and no more.
    found = swept_over({**dict.fromkeys(GRID, 3 * logit), (1.0, 0.0): logit}, target)
    assert (found.recommended.tau, found.recommended.ratio) == (math.inf, 0.0)
    assert found.recommended.temperature == pytest.approx(3, rel=0.25)
    assert found.recommendation.verdict.outcome == "better"
    assert found.recommended == found.recommendation.scaled[0]
    draws = found.recommendation.scaled[1]
    assert math.isfinite(draws.tau)
    assert found.recommendation.draws == DrawsPoint(tau=draws.tau, temperature=draws.temperature)
    for point in found.recommendation.scaled:
        assert point.chosen_on.nll <= mean(found).chosen_on.nll
        assert point.chosen_on.accuracy == mean(found).chosen_on.accuracy


def test_a_temperature_that_helps_is_kept_where_the_best_draws_are_noise() -> None:
    logit, target = questions(800)
    chose = torch.randperm(800, generator=torch.Generator().manual_seed(0))[:400]
    lucky = logit.clone()  # right more often than it should be, where it is chosen
    lucky[chose] += 0.3 * (2.0 * target - 1)[chose]
    lucky += 0.3 * torch.randn(800, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    swept = swept_over({**dict.fromkeys(GRID, 3 * logit), (1.0, 0.0): lucky}, target)
    assert (swept.recommendation.best.tau, swept.recommended) == (1.0, swept.recommendation.scaled[0])
    name = swept.recommended.describe()
    assert swept.recommendation.verdict.text.endswith(
        f": better than the mean, but beyond noise not than {name}: take {name}"
    )


def test_a_temperature_that_helps_need_not_be_beyond_noise() -> None:
    logit, target = questions(300)
    swept = swept_over(dict.fromkeys(GRID, 1.4 * logit), target)
    recommended, verdict = swept.recommended, swept.recommendation.verdict
    assert (recommended.tau, recommended.ratio, verdict.outcome) == (math.inf, 0.0, "within noise")
    assert recommended.temperature == pytest.approx(1.4, rel=0.3)
    told = f"within noise; but T costs nothing, and by cross-validation it helps: take {recommended.describe()}"
    assert verdict.text.endswith(told)
    assert verdict.examples_needed is None


def test_a_temperature_may_help_that_by_luck_did_not_where_points_are_chosen() -> None:
    logit, target = questions(304)
    swept = swept_over(dict.fromkeys(GRID, 1.25 * logit), target, objective="ece")
    assert swept.recommendation.best.temperature == 1 < swept.recommended.temperature
    told = f"but by cross-validation a T helps: take {swept.recommended.describe()}"
    assert swept.recommendation.verdict.text.endswith(told)
    assert swept.recommendation.verdict.outcome == "within noise"


def test_few_examples_recommend_nothing() -> None:
    logit, target = questions(40)
    heard = Heard()
    found = swept_over({**dict.fromkeys(GRID, -logit), (1.0, 0.0): logit}, target, reporter=heard)
    assert (found.recommendation.best.tau, found.recommended) == (1.0, mean(found))
    assert found.recommendation.verdict.outcome == "too few examples"
    noise = "only 20 examples choose and 20 report: most differences will be noise; 100 each are better"
    assert heard.notes == [noise]


@pytest.mark.parametrize(("count", "warned"), [(88, True), (90, False)])
def test_a_risk_that_no_threshold_can_promise_is_told_before_the_work(count: int, warned: bool) -> None:
    """Half of the examples certify it, and 0.95^45 < 0.1 < 0.95^44."""
    logit, target = questions(count)
    heard = Heard()
    swept_over(dict.fromkeys(GRID, logit), target, risk=0.05, reporter=heard)
    told = f"no threshold can promise a risk of 0.05 from {count // 2} examples; give at least 90, 45 of them "
    assert any(note.startswith(told) for note in heard.notes) == warned


def test_the_threshold_is_of_examples_that_chose_nothing() -> None:
    logit, target = questions(2000)
    logits = {**dict.fromkeys(GRID, 2 * logit), (1.0, 0.0): 0.9 * logit}
    swept = swept_over(logits, target, risk=0.1, confidence=0.95, coverage=0.9)
    assert swept.recommendation.examples == Sizes(chosen_on=500, reported_on=500)
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    scale = {math.inf: 2.0, 1.0: 0.9}[swept.recommended.tau] / swept.recommended.temperature
    confidence = (scale * logit).abs().sigmoid()
    correct = ((logit > 0).long() == target).double()
    parts = [values[where].numpy() for where in (shuffled[1000:], shuffled[:1000]) for values in (confidence, correct)]
    expected = find_threshold(*parts, risk=0.1, confidence=0.95)
    assert swept.abstention.threshold == pytest.approx(expected.threshold)
    assert (swept.abstention.answered, swept.abstention.errors) == (expected.answered, expected.errors)
    assert 0.3 < swept.abstention.coverage < 1
    right = torch.where(target == 1, scale * logit, -scale * logit).sigmoid()
    sets = swept.recommendation.prediction_set
    assert sets.threshold == pytest.approx(right[shuffled[1000:]].sort().values[99].item())  # ⌊1001·0.1⌋ = 100th
    assert sets.covered == pytest.approx(0.9, abs=0.04)


def test_written_answers_get_a_t_by_the_nll_of_their_tokens(tiny_adapter: Path, tmp_path: Path) -> None:
    """Of the grid that the end of training has, too; for draws that of their average."""
    data, sampling = write_chats(tmp_path / "chats.jsonl", count=70), Sampling(samples=2)
    evaluation = Evaluation(tiny_adapter, EvaluationData([data], task="generate"))
    variants = check_grid((1.0, math.inf), (0.0, 0.4))
    point = {p.tau: p for p in sweep(evaluation, variants, sampling=sampling).recommendation.scaled}
    choosing = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:35]
    kept = evaluation.run([Variant("x", 1.0), Variant("x")], Sampling(samples=2, keep=True))
    for tau, scores in zip((1.0, math.inf), kept, strict=True):
        part = scores.of_groups(choosing)
        target = torch.tensor([t for i in part.group.unique().tolist() for t in evaluation.items[i].targets])
        logs = part.probabilities[part.group.argsort(stable=True)].log()
        nll = {t: torch.nn.functional.cross_entropy(logs / t, target, reduction="sum").item() for t in TEMPERATURE_GRID}
        own = min(nll, key=lambda t, nll=nll: nll[t] + math.log(t) ** 2 / 2 / 0.3**2)  # type: ignore[misc]
        assert point[tau].temperature == own != 1
        assert point[tau].chosen_on.nll == pytest.approx(nll[own] / len(target), rel=1e-5)
        assert point[tau].ratio == 0


def test_grids_and_data_that_leave_nothing_to_choose() -> None:
    assert [(row.tau, row.ratio) for row in check_grid([1.0, 2.0], [0.1])] == [(math.inf, 0.0), (1.0, 0.1), (2.0, 0.1)]
    for taus, message in (([1.0, 1.0], "one point is nothing to choose"), ([0.0, 1.0], "tau")):
        with pytest.raises(IVONError, match=message):
            check_grid(taus, [0.0])
    few = Synthetic(dict.fromkeys(GRID, torch.zeros(7)), torch.zeros(7, dtype=torch.long))
    with pytest.raises(IVONError, match="7 examples cannot be split in a half and two quarters; give at least 8"):
        sweep(few, check_grid([1.0, 2.0], [0.0]), risk=0.1)  # type: ignore[arg-type]
    few.task, few.items = "generate", few.items[:3]
    with pytest.raises(IVONError, match="3 examples cannot be split in two halves"):
        sweep(few, check_grid([1.0, 2.0], [0.0]))  # type: ignore[arg-type]
    with pytest.raises(IVONError, match=r"risk 0\.1: the task generate scores tokens"):
        sweep(few, check_grid([1.0, 2.0], [0.0]), risk=0.1)  # type: ignore[arg-type]
