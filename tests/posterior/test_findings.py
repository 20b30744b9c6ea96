"""What is said of a run, by its figures."""

from __future__ import annotations

import pytest

from axolotl_ivon.posterior.findings import findings


def said(*arguments: object, **options: bool) -> dict[str, tuple[bool, str]]:
    return {one.about: (one.good, one.text) for one in findings(*arguments, **options)}


@pytest.mark.parametrize(
    ("moved", "allowed", "good", "words"),
    [
        (2e-4, 6e-4, False, ["hardly moved", "by 0.0002", "33% of the 0.0006", "raise the learning rate"]),
        (2e-4, 0.13, False, ["hardly moved", "λ may be too small"]),
        (2e-4, None, False, ["hardly moved", "λ may be too small"]),
        (0.02, 0.125, True, ["moved: by 0.02 on average, 16% of the 0.125"]),
        (0.1, 0.125, True, ["80%", "still on their way"]),
        (0.02, None, True, ["moved: by 0.02 on average"]),
    ],
)
def test_whether_the_weights_moved(moved: float, allowed: float | None, good: bool, words: list[str]) -> None:
    ok, text = said(moved, allowed, None, 0, None)["weights"]
    assert ok is good
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("spread", "steps", "beta2", "good", "words"),
    [
        (0.002, 160, 0.9995, False, ["was not learned", "0.2%", "remembers 2,000 steps", "had 160", "try β2 = 0.969"]),
        (0.002, 50_000, 0.9995, False, ["was not learned", "ranks weights nearly as |m| does"]),
        (0.05, 160, 0.9995, True, ["begun to be learned", "5.0%"]),
        (0.2, 5000, 0.9995, True, ["σ was learned", "20.0%"]),
    ],
)
def test_whether_sigma_was_learned(spread: float, steps: int, beta2: float, good: bool, words: list[str]) -> None:
    ok, text = said(None, None, spread, steps, beta2)["sigma"]
    assert ok is good
    assert all(word in text for word in words), text
    assert ("try β2" in text) == (steps == 160 and not good)
    _, text = said(None, None, spread, steps, beta2, inherited=True)["sigma"]
    assert ("σ began as the earlier adapter's" in text) is good


@pytest.mark.parametrize("beta2", [None, 1.0, -3.0, 0.0])
def test_odd_facts_of_a_header_are_passed_over(beta2: float | None) -> None:
    assert "try" not in said(None, None, 0.0, 5, beta2)["sigma"][1]
    assert not said(None, None, None, 0, beta2)
