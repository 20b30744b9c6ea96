"""Metrics against loops that follow their definitions, and the bootstrap against known standard errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from axolotl_ivon.metrics.bootstrap import bootstrap, standard_error, standard_errors
from axolotl_ivon.metrics.scores import Scores, entropy, metrics, weighted_metrics


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Distributions (n, classes) with ties and near-certain ones among them, and targets (n,)."""
    count, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    logits = draw(st.lists(st.sampled_from([-30.0, -2.0, -0.7, 0.0, 0.4, 3.0]), min_size=count * classes,
                           max_size=count * classes))  # fmt: skip
    target = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return torch.tensor(logits, dtype=torch.float64).view(count, classes).softmax(1), torch.tensor(target)


def ece(confidence: list[float], correct: list[bool], bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins <= c < (b + 1) / bins or (b == bins - 1 and c == 1)]
        if inside:
            gap = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(gap)
    return total


def auroc(confidence: list[float], correct: list[bool]) -> float | None:
    right = [c for c, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [c for c, ok in zip(confidence, correct, strict=True) if not ok]
    if not right or not wrong:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))


@given(predictions())
def test_metrics_follow_their_definitions(data: tuple[Tensor, Tensor]) -> None:
    p, target = data
    rows, labels = p.tolist(), target.tolist()
    # Half of the confidences that the strategy makes are 1/classes: keep clear of the edges of bins.
    confidence = [max(row) for row in rows]
    correct = [row.index(max(row)) == label for row, label in zip(rows, labels, strict=True)]
    n = len(rows)
    found = metrics(Scores.of(p, target))
    assert found["accuracy"] == pytest.approx(sum(correct) / n)
    assert found["nll"] == pytest.approx(-sum(math.log(r[t]) for r, t in zip(rows, labels, strict=True)) / n)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    brier = sum((q - (c == t)) ** 2 for r, t in zip(rows, labels, strict=True) for c, q in enumerate(r)) / n
    assert found["brier"] == pytest.approx(brier, abs=1e-12)
    assert found["entropy"] == pytest.approx(-sum(q * math.log(q) for r in rows for q in r) / n, abs=1e-12)
    assert found["mutual_information"] == 0
    if not any(abs(c * b - round(c * b)) < 1e-9 for c in confidence for b in (10, 15)):
        assert found["ece"] == pytest.approx(ece(confidence, correct, 10), abs=1e-9)
        assert found["ece15"] == pytest.approx(ece(confidence, correct, 15), abs=1e-9)
    assert found["auroc"] == pytest.approx(auroc(confidence, correct), abs=1e-6)


@given(predictions())
def test_calibration_and_auroc_are_those_of_torchmetrics(data: tuple[Tensor, Tensor]) -> None:
    scores = Scores.of(*data)
    found, right = metrics(scores), scores.correct.long()
    confidence = scores.confidence.clamp(0, 1)
    for name, bins in (("ece", 10), ("ece15", 15)):
        assert found[name] == pytest.approx(binary_calibration_error(confidence, right, n_bins=bins).item(), abs=2e-6)
    if 0 < right.sum() < len(right):
        assert found["auroc"] == pytest.approx(binary_auroc(confidence, right).item(), abs=2e-6)
    else:
        assert found["auroc"] is None


STORED = json.loads((Path(__file__).parent / "torch_uncertainty.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: str(len(case["target"])))
def test_selective_prediction_is_that_of_torch_uncertainty(case: dict) -> None:
    probabilities = torch.tensor(case["probabilities"], dtype=torch.float64)
    found = metrics(Scores.of(probabilities, torch.tensor(case["target"])))
    for name in ("aurc", "augrc", "cov_at_5risk", "risk_at_80cov", "aece"):
        assert found[name] == pytest.approx(case[name], abs=1e-6), name


def test_the_error_of_a_risk_is_that_of_a_share() -> None:
    # The 80 % that are answered are 800 with an error each by chance, whatever the confidence.
    generator = torch.Generator().manual_seed(0)
    first = 0.6 + 0.4 * torch.rand(1000, generator=generator, dtype=torch.float64)
    target = (torch.rand(1000, generator=generator) < 0.3).long()
    scores = Scores.of(torch.stack([first, 1 - first], 1), target)
    risk = metrics(scores)["risk_at_80cov"]
    assert standard_errors(scores)["risk_at_80cov"] == pytest.approx(math.sqrt(risk * (1 - risk) / 800), rel=0.1)


@given(predictions(), st.data())
def test_weights_count_as_repetitions(data: tuple[Tensor, Tensor], draw: st.DataObject) -> None:
    p, target = data
    times = draw.draw(st.lists(st.integers(0, 3), min_size=len(target), max_size=len(target)).filter(any))
    repeated = torch.repeat_interleave(torch.arange(len(target)), torch.tensor(times))
    expected = metrics(Scores.of(p[repeated], target[repeated]))
    weights = torch.tensor(times, dtype=torch.float64)[None]
    found = {name: value.item() for name, value in weighted_metrics(Scores.of(p, target), weights).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert math.isnan(found[name])
        else:
            assert found[name] == pytest.approx(value, rel=1e-6, abs=2e-6), name


def test_entropy_splits_into_noise_and_disagreement() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # two draws that contradict each other
    average = certain.mean(0, keepdim=True)
    found = metrics(Scores.of(average, torch.tensor([0]), entropy(certain).mean(0, keepdim=True)))
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["expected_entropy"] == 0
    assert found["mutual_information"] == pytest.approx(math.log(2))


def test_nothing_is_infinite_where_the_right_answer_had_no_probability() -> None:
    found = metrics(Scores.of(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))
    assert all(value is None or math.isfinite(value) for value in found.values())


def test_standard_error_of_a_share_and_of_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(800, 2, generator=generator, dtype=torch.float64)
    scores = Scores.of(p / p.sum(1, keepdim=True), torch.randint(2, (800,), generator=generator))
    errors = standard_errors(scores, resamples=2000)
    share = scores.correct.mean().item()
    # A standard deviation of 2,000 values is itself uncertain by 1/√(2·2000) = 1.6 %.
    assert errors["accuracy"] == pytest.approx(math.sqrt(share * (1 - share) / 800), rel=0.08)
    assert errors["nll"] == pytest.approx(scores.nll.std().item() / math.sqrt(800), rel=0.08)
    assert errors["auroc"] > 0


def test_predictions_of_one_example_are_drawn_together() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.55, 0.45]], dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0, 1])
    alone = standard_errors(Scores.of(p, target))
    four = torch.arange(5).repeat_interleave(4)
    together = standard_errors(Scores.of(p[four], target[four], group=four + 17))
    for name in alone.keys() - {"aurc", "augrc"}:  # whose trapezoids depend on n
        assert together[name] == pytest.approx(alone[name]), name
    apart = standard_errors(Scores.of(p[four], target[four]))
    assert apart["nll"] < 0.6 * alone["nll"]


def test_resamples_of_two_rows_are_paired() -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.softmax(torch.randn(400, 2, generator=generator, dtype=torch.float64), 1)
    target = torch.randint(2, (400,), generator=generator)
    one, other = Scores.of(p, target), Scores.of(0.9 * p + 0.05, target)
    difference = bootstrap(one, 2000)["nll"] - bootstrap(other, 2000)["nll"]
    expected = (one.nll - other.nll).std().item() / math.sqrt(400)
    assert standard_error(difference) == pytest.approx(expected, rel=0.08)
    assert standard_error(difference) < 0.5 * standard_error(bootstrap(one, 2000)["nll"])


def test_the_bootstrap_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.softmax(torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)
    scores = Scores.of(p, torch.arange(50) % 3)
    whole = standard_errors(scores, resamples=200)
    monkeypatch.setattr("axolotl_ivon.metrics.bootstrap._CELLS", 50 * 7)
    assert standard_errors(scores, resamples=200) == pytest.approx(whole)


def test_a_metric_without_a_value_has_no_error() -> None:
    scores = Scores.of(torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64), torch.tensor([0, 0]))
    assert metrics(scores)["auroc"] is None
    assert standard_errors(scores)["auroc"] is None


def test_scores_of_groups() -> None:
    p = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)), 1)
    target, group = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    whole = Scores.of(p, target, group=group, keep=True)
    both = whole.of_groups(torch.tensor([0, 2]))
    kept = torch.tensor([0, 1, 4, 5])
    expected = Scores.of(p[kept], target[kept], group=group[kept])
    assert metrics(both) == metrics(expected)
    assert both.group.tolist() == [0, 0, 2, 2]
    assert both.probabilities.equal(p[kept].double())
    joined = Scores.concatenate([both, whole.of_groups(torch.tensor([1]))])
    assert joined.probabilities.equal(p[[0, 1, 4, 5, 2, 3]].double())
    assert Scores.concatenate([expected, expected]).probabilities is None


def test_what_draws_do_not_say_has_no_value() -> None:
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    scores = Scores.of(p, torch.tensor([0, 0]), expected_entropy=torch.full((2,), math.nan))
    assert metrics(scores)["mutual_information"] is None
    assert metrics(scores)["entropy"] > 0
    assert standard_errors(scores)["expected_entropy"] is None
