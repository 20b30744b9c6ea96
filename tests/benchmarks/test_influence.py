"""benchmarks/influence.py: flipped labels, the tables of made-up results, and what is watched in training."""

from __future__ import annotations

import random

import pytest

from benchmarks.fidelity.data import Example
from benchmarks.influence import detection, flip, report


def test_a_tenth_of_the_labels_is_wrong() -> None:
    examples = [Example([i], i % 3) for i in range(50)]
    noisy, chosen = flip(examples, 3, seed=1)
    assert len(chosen) == 5
    assert [i for i in range(50) if noisy[i].label != examples[i].label] == chosen
    assert [e.ids for e in noisy] == [e.ids for e in examples]
    assert {e.label for e in noisy} == {0, 1, 2}
    assert flip(examples, 3, seed=1)[1] == chosen != flip(examples, 3, seed=2)[1]


def test_the_tables_tell_how_well_scores_find_them(capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    flipped = [3, 8]
    scores = {"loss": [float(i in (3, 7)) + i / 100 for i in range(20)], "random": [draw.random() for _ in range(20)]}
    found = detection(scores, flipped)
    pairs = [(scores["loss"][i], scores["loss"][j]) for i in flipped for j in range(20) if j not in flipped]
    assert found["loss"]["auroc"] == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    assert found["loss"]["precision"] == 0.5
    common = {"task": "movie", "train": 20, "steps": 5, "seed": 0}
    test = {"accuracy": 0.75, "nll": 0.5}
    report(
        [
            {**common, "what": "scores", "flipped": flipped, "detection": found, "scores": scores, "test": test},
            {**common, "what": "retrained", "by": "loss", "test": {"accuracy": 0.8, "nll": 0.4}},
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "movie, 20 examples, a tenth flipped, 5 steps, seeds: 1" in lines
    assert f"| loss | {100 * found['loss']['auroc']:.1f} | 50.0 |" in lines
    assert "| without the tenth of loss (accuracy +5.0) | 80.0 | 0.400 | 1 |" in lines
