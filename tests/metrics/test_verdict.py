"""Paired differences against a standard error known beforehand, and what the verdicts say of them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from axolotl_ivon.metrics.scores import Scores, bootstrap, metrics
from axolotl_ivon.metrics.verdict import differences, examples_needed, verdicts


def test_a_difference_has_the_error_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(600, 2, generator=generator, dtype=torch.float64), 1)
    target = torch.multinomial(p, 1, generator=generator).squeeze(1)
    one, other = Scores.of(p, target), Scores.of(0.95 * p + 0.025, target)
    found = differences(metrics(one), metrics(other), bootstrap(one), bootstrap(other))
    away = one.nll - other.nll
    assert found["nll"]["difference"] == pytest.approx(away.mean().item())
    assert found["nll"]["standard_error"] == pytest.approx(away.std().item() / math.sqrt(600), rel=0.1)
    assert found["accuracy"] == {"difference": 0, "standard_error": 0}  # the same guesses
    assert found.keys() == metrics(one).keys()


def test_a_metric_that_one_lacks_has_no_difference() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    right, half = Scores.of(p, torch.tensor([0, 0])), Scores.of(p, torch.tensor([0, 1]))
    found = differences(metrics(right), metrics(half), bootstrap(right), bootstrap(half))
    assert metrics(right)["auroc"] is None
    assert "auroc" not in found
    assert "nll" in found


def test_the_examples_that_would_tell_bring_the_error_to_half_the_difference() -> None:
    assert examples_needed(100, 0.02, 0.02) == 400
    assert examples_needed(100, -0.02, 0.02) == 400
    assert examples_needed(123, 0.01, 0.017) == 1500  # 1,422
    assert examples_needed(300, 0.0, 0.01) is None
    assert examples_needed(300, 1e-9, 0.01) is None


def row(name: str, nll: float, error: float, than: str = "mean", examples: int = 300, data: str = "a") -> dict:
    figures = {"nll": {"difference": nll, "standard_error": error}}
    return {"name": name, "data": data, "examples": examples, "samples": 10, f"versus_{than}": figures}


@pytest.mark.parametrize(
    ("given", "verdict", "text"),
    [
        (row("posterior", -0.021, 0.006), "better", "10 draws are better than the mean: NLL −0.021 ± 0.006"),
        (row("posterior", 0.021, 0.006), "worse", "10 draws are worse than the mean: NLL +0.021 ± 0.006"),
        (
            row("posterior", -0.004, 0.006),
            "within noise",
            "10 draws and the mean are within noise: NLL −0.004 ± 0.006; about 2,700 examples would tell",
        ),
        (
            row("posterior", -0.00001, 0.006),
            "within noise",
            "10 draws and the mean are within noise: NLL −0.000 ± 0.006; more than a million examples would tell",
        ),
        (row("posterior", 0.0, 0.0), "the same", "10 draws and the mean predict the same"),
        (
            row("posterior", -0.5, 0.01, examples=12),
            "too few examples",
            "12 examples are too few to tell 10 draws from the mean: NLL −0.500 ± 0.010",
        ),
        (row("mean", -0.5, 0.01, "base"), "better", "the mean is better than the base model: NLL −0.500 ± 0.010"),
        (
            {**row("posterior", -0.5, 0.01), "samples": 1},
            "better",
            "one draw is better than the mean: NLL −0.500 ± 0.010",
        ),
        (
            row("posterior+temperature", 0.5, 0.01, "mean+temperature"),
            "worse",
            "10 draws at a fitted temperature are worse than the mean at its own: NLL +0.500 ± 0.010",
        ),
    ],
)
def test_a_verdict_in_words(given: dict, verdict: str, text: str) -> None:
    [found] = verdicts([given])
    assert (found["verdict"], found["text"]) == (verdict, text)
    assert (found["examples_needed"] is not None) == (verdict == "within noise")


def test_within_noise_in_nll_does_not_hide_an_accuracy_that_differs() -> None:
    given = row("mean", -0.054, 0.215, "base")
    given["versus_base"] |= {
        "accuracy": {"difference": 0.35, "standard_error": 0.083}, "ece": {"difference": -0.06, "standard_error": 0.07},
    }  # fmt: skip
    [found] = verdicts([given])
    assert found["verdict"] == "within noise"
    assert found["text"].startswith("the mean and the base model are within noise in NLL, but not in accuracy: NLL")


def test_verdicts_come_file_by_file_and_only_where_both_rows_are() -> None:
    rows = [row("mean", -1, 0.1, "base"), row("posterior", -1, 0.1), row("posterior-pruned", -1, 0.1)]
    rows += [{**one, "data": "b"} for one in rows]
    found = verdicts(rows)
    assert [(one["data"], one["name"], one["than"]) for one in found] == [
        (path, *pair) for path in "ab" for pair in (("mean", "base"), ("posterior", "mean"))
    ]
    assert verdicts([{"name": "posterior", "data": "a", "examples": 5, "samples": 3}]) == []


def test_accuracy_and_calibration_are_told_beside_the_nll() -> None:
    given = row("posterior", -0.02, 0.005)
    given["versus_mean"] |= {
        "accuracy": {"difference": -0.0123, "standard_error": 0.02},
        "ece": {"difference": 0.0, "standard_error": None},
    }
    [found] = verdicts([given])
    assert found["text"].endswith(": NLL −0.020 ± 0.005, accuracy −1.2 ± 2.0 %, ECE +0.0 %")


def test_a_verdict_needs_no_torch() -> None:
    code = "import sys; from axolotl_ivon.metrics.verdict import verdicts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
