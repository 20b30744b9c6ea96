"""The figure has what was measured, and the files what was chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axolotl_ivon.generation.mbr import CurvePoint, MBRSettings, mbr
from axolotl_ivon.generation.nbest import NBest
from axolotl_ivon.generation.utilities import AnswerExtractor, exact
from axolotl_ivon.plots.scaling import save, scaling


def test_the_figure_has_every_point() -> None:
    curves = {
        "mean": [CurvePoint(8, 0.5, 0.1, 0.5), CurvePoint(16, 0.6, 0.1, 0.6)],
        "posterior": [CurvePoint(8, 0.4, 0.1, 0.4), CurvePoint(16, 0.7, 0.1, 0.7)],
    }
    axes = scaling(curves).axes[0]
    drawn = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axes.containers}
    assert drawn == {label: pytest.approx([100 * point.accuracy for point in curve]) for label, curve in curves.items()}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16"]
    for container in axes.containers:
        assert container.lines[0].get_xdata() == pytest.approx([8, 16], rel=0.02)


def test_saved_choices_and_pictures(tmp_path: Path) -> None:
    answers = AnswerExtractor()
    nbest = NBest("\ud800", "a", ("a",) * 8, (0,) * 8, (-1.0,) * 8, "f.jsonl:1")
    found = mbr([nbest], MBRSettings(exact(answers), answers))
    paths = save({"x": found}, tmp_path / "deep" / "out")
    assert [path.name for path in paths] == ["x.jsonl", "accuracy.png", "accuracy.svg"]
    record = json.loads(paths[0].read_text())
    assert record["text"] == record["answer"] == "a"
    assert record["prompt"] == "\ud800"  # half a surrogate pair
    assert record["expected_utility"] == pytest.approx(1)
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[2].read_bytes()
