"""A sweep over the weights of a product: its grid, its front, and a choice that is honest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write_chats

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.decisions.sweep import pareto_front
from axolotl_ivon.decisions.weights import check_files, grid, save, sweep_weights
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.metrics.scores import Scores, metrics


@pytest.mark.parametrize(("count", "points"), [(2, 9), (3, 16), (4, 35)])
def test_the_grid_is_a_simplex_with_equal_weights_in_it(count: int, points: int) -> None:
    found = grid(count)
    assert len(set(found)) == len(found) == points
    assert all(sum(weights) == pytest.approx(count) and min(weights) >= 0 for weights in found)
    assert (1.0,) * count in found
    ends = {tuple(float(count) * (i == j) for i in range(count)) for j in range(count)}
    assert ends <= set(found)


@pytest.fixture(scope="module")
def folders(make_adapter: Callable[..., Path]) -> list[Path]:
    return [make_adapter(seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def posteriors(folders: list[Path]) -> list[Posterior]:
    return [Posterior.from_pretrained(folder) for folder in folders]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    return [write_chats(folder / f"{name}.jsonl", 80, seed) for seed, name in enumerate("ab")]


def test_every_product_is_scored_as_it_is_by_itself(
    folders: list[Path], posteriors: list[Posterior], files: list[Path], tmp_path: Path
) -> None:
    evaluation = Evaluation(folders[0], EvaluationData(files))
    result = sweep_weights(evaluation, posteriors, sampling=Sampling(samples=0, seed=3))
    assert [point.weights for point in result.points] == grid(2)
    point = result.points[2]
    alone = Evaluation(folders[0], EvaluationData([files[0]]))
    product = Posterior.combine(posteriors, weights=point.weights)
    whole = metrics(alone.run([Variant("mean")], posterior=product)[0])
    halves = (point.chosen_on[str(files[0])]["nll"] + point.reported_on[str(files[0])]["nll"]) / 2
    assert halves == pytest.approx(whole["nll"], rel=1e-6)
    sums = [sum(values["nll"] for values in one.chosen_on.values()) for one in result.points]
    assert result.best is result.points[sums.index(min(sums))]
    assert result.chosen.weights == (result.best.weights if result.outcome == "better" else (1.0, 1.0))
    reported = [
        sum(values["nll"] for values in one.reported_on.values()) / 2
        for one in (result.best, next(p for p in result.points if p.weights == (1.0, 1.0)))
    ]
    assert result.difference == pytest.approx(reported[0] - reported[1], abs=1e-9)

    written = save(result, posteriors, tmp_path / "out", {"data": list(map(str, files))})
    assert written == tmp_path / "out" / "weights.json"
    document = json.loads(written.read_text())
    assert document["weights"] == list(result.chosen.weights)
    assert len(document["points"]) == 9
    assert sum(point["front"] for point in document["points"]) >= 1
    saved = Posterior.from_pretrained(tmp_path / "out")
    expected = Posterior.combine(posteriors, weights=result.chosen.weights)
    assert all(torch.equal(saved.mean[key], expected.mean[key]) for key in expected.mean)
    with pytest.raises(IVONError, match="out"):
        save(result, posteriors, tmp_path / "out", {})


def test_a_posterior_that_is_right_about_all_data_is_chosen(
    folders: list[Path], posteriors: list[Posterior], files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are made up: the more of the first posterior, the likelier the right answer."""
    evaluation = Evaluation(folders[0], EvaluationData(files))
    weights, count = iter(grid(2)), len(evaluation.items)

    def scored(*_: object) -> list[Scores]:
        right = 0.5 + 0.2 * next(weights)[0] + 0.01 * torch.randn(count, generator=torch.Generator().manual_seed(0))
        return [Scores.of(torch.stack([right, 1 - right], 1).double(), torch.zeros(count, dtype=torch.int64))]

    monkeypatch.setattr(evaluation, "run", scored)
    result = sweep_weights(evaluation, posteriors)
    assert result.outcome == "better"
    assert result.chosen.weights == (2.0, 0.0)
    assert result.difference == pytest.approx(math.log(0.7) - math.log(0.9), abs=0.01)
    assert result.text.endswith("better")
    assert [point.front for point in result.points].count(True) == 1


@pytest.mark.parametrize(
    ("adapters", "data", "words"),
    [(["a"], ["x", "y"], "1 posterior cannot be combined"), (["a", "b"], ["x"], "a trade-off between files"),
     (["a", "b"], ["x", "x"], "a trade-off between files")],
)  # fmt: skip
def test_what_is_nothing_to_choose_between_is_refused(adapters: list[str], data: list[str], words: str) -> None:
    with pytest.raises(IVONError, match=words):
        check_files(adapters, data)


def test_too_few_examples_keep_equal_weights(
    folders: list[Path], posteriors: list[Posterior], files: list[Path]
) -> None:
    few = Evaluation(folders[0], EvaluationData(files, limit=8))
    for objective, sign in (("nll", 1), ("accuracy", -1)):
        result = sweep_weights(few, posteriors, objective, Sampling(samples=2))
        costs = [[sign * values[objective] for values in point.chosen_on.values()] for point in result.points]
        assert [point.front for point in result.points] == pareto_front(costs)
        assert result.best is result.points[min(range(9), key=lambda place: sum(costs[place]))]
        assert result.chosen.weights == (1.0, 1.0)
        assert result.outcome in ("equal", "too few examples", "the same")
    few.files = {path: numbers[:3] for path, numbers in few.files.items()}
    with pytest.raises(IVONError, match="3 examples cannot be split in two"):
        sweep_weights(few, posteriors)
