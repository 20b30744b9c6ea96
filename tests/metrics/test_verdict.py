"""Paired differences against a standard error known beforehand, and what the verdicts say of them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from axolotl_ivon.metrics.bootstrap import compare, standard_errors
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.metrics.verdict import Paired, examples_needed, figures, judge


def test_a_difference_has_the_error_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(600, 2, generator=generator, dtype=torch.float64), 1)
    target = torch.multinomial(p, 1, generator=generator).squeeze(1)
    one, other = Scores.of(p, target), Scores.of(0.95 * p + 0.025, target)
    found, away = compare(one, other), one.nll - other.nll
    assert found["nll"].difference == pytest.approx(away.mean().item())
    assert found["nll"].standard_error == pytest.approx(away.std().item() / math.sqrt(600), rel=0.1)
    assert found["nll"].standard_error < 0.5 * standard_errors(one)["nll"]
    assert found["accuracy"] == (0, 0)  # the same guesses
    assert found.keys() == metrics(one).keys()
    all_right = Scores.of(p, p.argmax(1))
    assert compare(all_right, other).keys() == metrics(one).keys() - {"auroc"}  # which only one has


@pytest.mark.parametrize(
    ("given", "needed"),
    [((100, 0.02, 0.02), 400), ((100, -0.02, 0.02), 400), ((123, 0.01, 0.017), 1500),  # 1,422
     ((300, 0.0, 0.01), None), ((300, 1e-9, 0.01), None)],
)  # fmt: skip
def test_the_error_is_half_the_difference_of_as_many(given: tuple[int, float, float], needed: int | None) -> None:
    assert examples_needed(*given) == needed


@pytest.mark.parametrize(
    ("difference", "error", "examples", "outcome"),
    [
        (0.0, 0.0, 5, "the same"),
        (-1.0, 0.1, 29, "too few examples"),
        (-0.1, 0.051, 30, "within noise"),
        (0.0, 0.1, 30, "within noise"),
        (-0.1, 0.05, 30, "better"),
        (0.1, 0.05, 30, "worse"),
        (0.1, 0.0, 30, "worse"),
        (-4e-4, 1e-5, 30, "the same"),
    ],
)
def test_what_a_difference_means(difference: float, error: float, examples: int, outcome: str) -> None:
    assert judge(difference, error, examples) == outcome
    assert judge(-difference, error, examples, sign=-1) == outcome


def test_differences_in_words() -> None:
    pairs = {"nll": (-0.02, 0.005), "accuracy": (-0.0123, 0.02), "ece": (0.0, None), "brier": (1.0, 1.0)}
    versus = {metric: Paired(*pair) for metric, pair in pairs.items()}
    assert figures(versus) == "NLL −0.020 ± 0.005, accuracy −1.2 ± 2.0 %, ECE +0.0 %"
    assert [pair.is_beyond_noise for pair in versus.values()] == [True, False, False, False]


def test_a_verdict_needs_no_torch() -> None:
    code = "import sys; from axolotl_ivon.evaluation.run import verdicts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
