"""The grid, the front and the recommendation; what is promised is measured on data that did not choose."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_chats

from axolotl_ivon import IVONError
from axolotl_ivon.evaluation.evaluate import Evaluation
from axolotl_ivon.evaluation.metrics import metrics
from axolotl_ivon.evaluation.sweep import (
    OBJECTIVES,
    Decision,
    Sweep,
    best,
    check_grid,
    pareto_front,
    read_decision,
    read_recommended,
    sweep,
)

TAUS, RATIOS = (0.3, 1.0, math.inf), (0.0, 0.4)


def point(accuracy: float, ece: float, nll: float = 0.0) -> dict[str, float]:
    return {"accuracy": accuracy, "ece": ece, "nll": nll, "brier": 0.0}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_front_holds_what_nothing_beats(places: list[tuple[int, int]]) -> None:
    front = pareto_front([point(accuracy, ece) for accuracy, ece in places])
    for i, (accuracy, ece) in enumerate(places):
        beaten = any((a >= accuracy and e < ece) or (a > accuracy and e <= ece) for a, e in places)
        assert front[i] == (not beaten)
    assert any(front)


def test_the_best_is_least_or_greatest_and_nll_decides_between_equals() -> None:
    values = [point(0.8, 0.1, 0.5), point(0.9, 0.2, 0.6), point(0.9, 0.3, 0.4), point(0.7, 0.05, 0.9)]
    assert best(values, "accuracy") == 2
    assert best(values, "ece") == 3
    assert best(values, "nll") == 2
    assert best(values, "brier") == 2


def test_the_choice_is_made_on_one_half_and_reported_on_the_other(swept: Evaluation, result: Sweep) -> None:
    assert [(p.tau, p.ratio) for p in result.points] == [(tau, ratio) for ratio in RATIOS for tau in TAUS]
    assert result.recommended == min(range(6), key=lambda i: result.points[i].chosen_on["nll"])
    scores = swept.run(check_grid(TAUS, RATIOS), seed=4, samples=2)
    shuffled = torch.randperm(31, generator=torch.Generator().manual_seed(4))
    for p, score in zip(result.points, scores, strict=True):
        assert p.chosen_on == metrics(score.of_groups(shuffled[:15]))
        assert p.reported_on == metrics(score.of_groups(shuffled[15:]))
    # Every example is in one half: the two, weighted, are the whole.
    for p, score in zip(result.points, scores, strict=True):
        whole = (15 * p.chosen_on["nll"] + 16 * p.reported_on["nll"]) / 31
        assert whole == pytest.approx(metrics(score)["nll"])
    assert set(result.error) == set(result.points[0].reported_on)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_followed(swept: Evaluation, objective: str) -> None:
    found = sweep(swept, check_grid(TAUS, RATIOS), objective, seed=4, samples=2)
    values = [p.chosen_on[objective] for p in found.points]
    assert values[found.recommended] == (max(values) if objective == "accuracy" else min(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ('{"tau": 1}', "no `tau` and `ratio`"),
        ('{"tau": 0, "ratio": 0}', "tau is 0"),
        ('{"tau": NaN, "ratio": 0}', "not valid JSON"),
        ('{"tau": 1e999, "ratio": 0}', "not valid JSON"),
        ('{"tau": 1' + "0" * 400 + ', "ratio": 0}', "tau is 10"),
        ('{"tau": "hot", "ratio": 0}', "tau is 'hot'"),
        ('{"tau": true, "ratio": 0}', "tau is True"),
        ('{"tau": 1, "ratio": 1.5}', "ratio is 1.5"),
        ('{"tau": 1, "ratio": "inf"}', "ratio is 'inf'"),
        ('{"tau": 1, "ratio": null}', "ratio is None"),
    ],
)
def test_a_recommendation_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recommended.json"
    path.write_text(text)
    with pytest.raises(IVONError, match=message) as caught:
        read_recommended(path)
    assert str(path) in str(caught.value)
    with pytest.raises(IVONError, match="cannot be read"):
        read_recommended(tmp_path)


def test_what_a_recommendation_decides_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "recommended.json"
    path.write_text('{"tau": 1, "ratio": 0}')
    assert read_decision(path) == Decision()
    path.write_text(
        '{"tau": 1, "ratio": 0, "temperature": 2, "threshold": 0.5, "score": "agreement", "mean_sha256": "a"}'
    )
    assert read_decision(path) == Decision(2.0, 0.5, "agreement", "a")
    for key, value in (("temperature", "0"), ("temperature", '"hot"'), ("threshold", "1.5"), ("threshold", "true")):
        path.write_text(f'{{"tau": 1, "ratio": 0, "{key}": {value}}}')
        with pytest.raises(IVONError, match=rf"recommended .*recommended.json: {key} is .*; it must be"):
            read_decision(path)
    path.write_text('{"threshold": 0.5}')
    with pytest.raises(IVONError, match="no `tau` and `ratio`"):
        read_decision(path)


def test_grids_and_data_that_leave_nothing_to_choose(swept: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(IVONError, match="one point is nothing to choose"):
        check_grid([1.0, 1.0], [0.0])
    with pytest.raises(IVONError, match="tau"):
        check_grid([0.0, 1.0], [0.0])
    few = Evaluation(swept.posterior.folder, [write_chats(tmp_path / "few.jsonl", 3)], choices=["A", "B"])
    with pytest.raises(IVONError, match="3 examples cannot be split"):
        sweep(few, check_grid(TAUS, RATIOS))
