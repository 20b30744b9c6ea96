"""Metrics, detection and temperature scaling against their definitions and other libraries; the bootstrap."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from axolotl_ivon.metrics.auroc import auroc, detection
from axolotl_ivon.metrics.bootstrap import standard_errors
from axolotl_ivon.metrics.calibration import TEMPERATURES, fit_temperature, probable_temperature, rescale
from axolotl_ivon.metrics.scores import Scores, entropy, metrics, weighted_metrics


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Distributions (n, classes) with ties and near-certain ones among them, and targets (n,)."""
    count, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    logits = draw(st.lists(st.sampled_from([-30.0, -2.0, -0.7, 0.0, 0.4, 3.0]), min_size=count * classes,
                           max_size=count * classes))  # fmt: skip
    target = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return torch.tensor(logits, dtype=torch.float64).view(count, classes).softmax(1), torch.tensor(target)


@given(predictions())
def test_metrics_follow_their_definitions(data: tuple[Tensor, Tensor]) -> None:
    rows, labels = data[0].tolist(), data[1].tolist()
    scores, n = Scores.of(*data), len(rows)
    found, right = metrics(scores), scores.correct.long()
    assert found["accuracy"] == pytest.approx(sum(r.index(max(r)) == t for r, t in zip(rows, labels, strict=True)) / n)
    assert found["nll"] == pytest.approx(-sum(math.log(r[t]) for r, t in zip(rows, labels, strict=True)) / n)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    brier = sum((q - (c == t)) ** 2 for r, t in zip(rows, labels, strict=True) for c, q in enumerate(r)) / n
    assert found["brier"] == pytest.approx(brier, abs=1e-12)
    assert found["entropy"] == pytest.approx(-sum(q * math.log(q) for r in rows for q in r) / n, abs=1e-12)
    assert found["mutual_information"] == 0
    confidence = scores.confidence.clamp(0, 1)
    for name, bins in (("ece", 10), ("ece15", 15)):
        assert found[name] == pytest.approx(binary_calibration_error(confidence, right, n_bins=bins).item(), abs=2e-6)
    if 0 < right.sum() < n:
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


@given(predictions(), st.data())
def test_weights_count_as_repetitions(data: tuple[Tensor, Tensor], draw: st.DataObject) -> None:
    p, target = data
    times = draw.draw(st.lists(st.integers(0, 3), min_size=len(target), max_size=len(target)).filter(any))
    repeated = torch.repeat_interleave(torch.arange(len(target)), torch.tensor(times))
    each = [metrics(Scores.of(p[rows], target[rows])) for rows in (repeated, torch.arange(len(target)))]
    weights = torch.stack([torch.tensor(times), torch.ones(len(target))]).double()
    found = weighted_metrics(Scores.of(p, target), weights)
    assert found.keys() == each[0].keys()
    for name, values in found.items():
        expected = [math.nan if one[name] is None else one[name] for one in each]
        assert values.tolist() == pytest.approx(expected, rel=1e-6, abs=2e-6, nan_ok=True), name


def test_entropy_splits_into_noise_and_disagreement() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # two draws that contradict each other
    average = certain.mean(0, keepdim=True)
    found = metrics(Scores.of(average, torch.tensor([0]), entropy(certain).mean(0, keepdim=True)))
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["expected_entropy"] == 0
    assert found["mutual_information"] == pytest.approx(math.log(2))


def test_standard_errors_of_shares_and_of_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    first = 0.6 + 0.4 * torch.rand(1000, generator=generator, dtype=torch.float64)
    target = (torch.rand(1000, generator=generator) < 0.3).long()
    scores = Scores.of(torch.stack([first, 1 - first], 1), target)
    found, errors = metrics(scores), standard_errors(scores, resamples=2000)
    # A standard deviation of 2,000 values is itself uncertain by 1/√(2·2000) = 1.6 %.
    assert errors["nll"] == pytest.approx(scores.nll.std().item() / math.sqrt(1000), rel=0.08)
    # Of the 80 % that are answered each is wrong by chance, whatever its confidence.
    for name, count in (("accuracy", 1000), ("risk_at_80cov", 800)):
        assert errors[name] == pytest.approx(math.sqrt(found[name] * (1 - found[name]) / count), rel=0.08)
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


def test_the_bootstrap_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.softmax(torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)
    scores = Scores.of(p, torch.arange(50) % 3)
    whole = standard_errors(scores, resamples=200)
    monkeypatch.setattr("axolotl_ivon.metrics.bootstrap._CELLS", 50 * 7)
    assert standard_errors(scores, resamples=200) == pytest.approx(whole)


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


def test_what_has_no_value_is_none_and_nothing_is_infinite() -> None:
    p = torch.tensor([[0.9, 0.1], [1.0, 0.0]], dtype=torch.float64)
    found = Scores.of(p, torch.tensor([0, 0]), expected_entropy=torch.full((2,), math.nan))
    for name in ("auroc", "expected_entropy", "mutual_information"):
        assert (metrics(found)[name], standard_errors(found)[name]) == (None, None)
    assert metrics(found)["entropy"] > 0
    surprised = metrics(Scores.of(p[1:], torch.tensor([1])))
    assert all(value is None or math.isfinite(value) for value in surprised.values())


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30))
def test_figures_are_those_of_others_and_weights_count_as_repetitions(values: list[tuple[int, bool, int]]) -> None:
    score, positive, times = (np.array(column) for column in zip(*values, strict=True))
    score = score / 9
    weights = np.stack([times, np.ones(len(times))])
    both = auroc(score, positive, weights)
    repeated = score.repeat(times), positive.repeat(times)
    for found, (one, right) in zip(both, [repeated, (score, positive)], strict=True):
        if len({*right.tolist()}) < 2:
            assert np.isnan(found)
            continue
        assert found == pytest.approx(roc_auc_score(right, one))
        assert found == pytest.approx(float(binary_auroc(torch.from_numpy(one), torch.from_numpy(right).long())))
        told = detection(one, right)
        assert told["auroc"].shape == ()
        assert told["auroc"] == pytest.approx(found)
        assert told["aupr"] == pytest.approx(average_precision_score(right, one))
        misses, hits, _ = roc_curve(right, one, drop_intermediate=False)
        assert told["fpr95"] == pytest.approx(misses[hits >= 0.95][0])
    if not np.isnan(both).any():
        for name, pair in detection(score, positive, weights).items():
            assert pair == pytest.approx([detection(*repeated)[name], detection(score, positive)[name]])


def test_equal_bets_have_a_closed_form() -> None:
    # All bet 0.9 on one side and 7 of 10 are right: the best bet is 0.7, and log-odds are divided by T.
    p = torch.tensor([[0.9, 0.1]] * 10, dtype=torch.float64)
    target = torch.tensor([0] * 7 + [1] * 3)
    temperature = fit_temperature(p, target)
    assert temperature == pytest.approx(math.log(9) / math.log(7 / 3))
    torch.testing.assert_close(rescale(p, temperature)[0], torch.tensor([0.7, 0.3], dtype=torch.float64))


@given(st.integers(0, 10_000), st.floats(0.2, 5))
def test_no_temperature_on_a_grid_is_better(seed: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    p = (logits * sharpness).softmax(1)

    def nll(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits * sharpness / temperature, target).item()

    found = fit_temperature(p, target)
    assert nll(found) <= min(nll(t) for t in torch.logspace(-2, 2, 101).tolist()) + 1e-9
    expected = (logits * sharpness / found).softmax(1)
    torch.testing.assert_close(rescale(p, found), expected)
    # The float32 distributions of the task "generate" have the same minimum.
    assert nll(fit_temperature(p.float(), target)) == pytest.approx(nll(found), abs=1e-6)


@given(st.integers(0, 10_000), st.floats(0.05, 20), st.integers(1, 60))
def test_the_probable_temperature_is_the_mode_of_its_posterior(seed: int, sharpness: float, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)

    def cost(t: float) -> float:
        logs = logits * sharpness / t
        return torch.nn.functional.cross_entropy(logs, target, reduction="sum").item() + (math.log(t) / 0.3) ** 2 / 2

    found = probable_temperature((logits * sharpness).softmax(1), target)
    assert cost(found) <= min(cost(t) for t in torch.logspace(-2, 2, 201).tolist()) + 1e-6


def test_what_has_no_minimum_is_at_a_limit() -> None:
    p = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    assert fit_temperature(p, torch.tensor([0, 1])) == TEMPERATURES[0]  # all right: the surer the better
    assert fit_temperature(p, torch.tensor([1, 0])) == TEMPERATURES[1]  # all wrong
    impossible = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert 1 < fit_temperature(impossible, torch.tensor([0, 1])) <= TEMPERATURES[1]
    torch.testing.assert_close(rescale(impossible, 1), impossible)
