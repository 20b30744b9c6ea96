"""What a sweep leaves behind: a recommendation that is read back, and pictures of it."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import binomtest

from axolotl_ivon import IVONError
from axolotl_ivon.decisions.sweep import GridPoint, Sweep, Verdict, check_output, read_recommended
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.plots.evaluations import Bin, reliability, reliability_bins, save


def made(count: int, sharpness: float = 1.0) -> Scores:
    """Scores of `count` predictions between three classes; at sharpness 1 they are calibrated."""
    generator = torch.Generator().manual_seed(count)
    logits = 1.5 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return Scores.of((sharpness * logits).softmax(1), target)


@pytest.fixture
def telling() -> Sweep:
    """A sweep over points that differ by more than noise."""
    named = {"mean": made(300, 3), "posterior": made(300), "recommended": made(300, 0.8)}
    points = [
        GridPoint(tau, ratio, {**metrics(made(300, 1 / (tau + 0.1))), "accuracy": 0.9 - ratio}, {}, tau == 1)
        for ratio in (0.0, 0.4)
        for tau in (0.3, 1.0, math.inf)
    ]
    verdict = Verdict({}, "better", [], None, "it is better")
    errors = {"accuracy": 0.02, "ece": 0.03}
    return Sweep(points, [], points[1], points[1], "nll", verdict, (300, 300), errors, named)


@pytest.mark.parametrize("which", ["result", "telling"])
def test_what_is_saved_is_read_back(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    swept: Sweep = request.getfixturevalue(which)
    files = save(swept, tmp_path / "a" / "out", {"adapter": "x"})
    assert {path.name for path in files} == {path.name for path in (tmp_path / "a" / "out").iterdir()}
    chosen = swept.recommended
    assert read_recommended(files[0]) == (chosen.tau, chosen.ratio)
    written = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written["adapter"] == "x"
    assert written["chosen_on"] == chosen.chosen_on
    assert [p["tau"] for p in written["grid"]] == [0.3, 1.0, "inf", 0.3, 1.0, "inf"]


def test_pictures_are_pictures(telling: Sweep, tmp_path: Path) -> None:
    told: list[str] = []
    files = save(telling, tmp_path, {}, told.append)
    assert told == []
    assert [path.name for path in files[1:]] == ["trade-off.png", "trade-off.svg", "reliability.png", "reliability.svg"]
    for path in files[1:]:
        if path.suffix == ".png":
            picture = imread(path)
            assert picture.shape[0] > 400
            assert picture.std() > 0.05
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")


def test_where_nothing_is_to_be_seen_there_is_no_picture(telling: Sweep, tmp_path: Path) -> None:
    save(telling, tmp_path, {})
    few = {name: scores.where(torch.arange(6)) for name, scores in telling.reliability.items()}
    flat = replace(telling, error={"accuracy": 0.5, "ece": 0.5}, reliability=few)
    told: list[str] = []
    files = save(flat, tmp_path, {}, told.append)
    assert len(told) == 2
    assert re.fullmatch(
        r"no picture of the trade-off: over the grid ECE differs by [\d.]+ % and accuracy by 40.0 %, no more than "
        r"their standard errors of 50.0 and 50.0 %",
        told[0],
    )
    assert told[1] == "no reliability diagram: no two bins of confidence have 5 predictions or more"
    # An earlier sweep's pictures would belong to another recommendation.
    assert [path.name for path in files] == [path.name for path in tmp_path.iterdir()] == ["recommended.json"]


def test_a_reliability_diagram_says_how_sure_it_is() -> None:
    scores = made(150, 2)
    figure = reliability({"mean": scores})
    assert isinstance(figure, Figure)
    top, bottom = figure.axes
    assert top.get_title().endswith("n = 150")
    bins = [one for one in reliability_bins(scores) if one.count]
    telling = [one for one in bins if one.count >= 5]
    assert len(bins) - len(telling) > 0
    [errors] = [container for container in top.containers if isinstance(container, ErrorbarContainer)]
    drawn = errors.lines[2][0].get_segments()
    assert len(drawn) == len(telling)
    for one, segment in zip(telling, drawn, strict=True):
        assert segment[:, 1] == pytest.approx(one.interval())
    [hollow] = [line for line in top.get_lines() if line.get_marker() == "o"]
    assert list(hollow.get_ydata()) == [one.accuracy for one in bins if one.count < 5]
    assert [text.get_text() for text in bottom.texts] == [str(one.count) for one in bins]
    twice = torch.arange(300) // 2
    tokens = replace(made(300), group=twice)
    assert "n = 300 tokens of 150 answers" in reliability({"mean": tokens}).axes[0].get_title()


@given(st.integers(1, 200), st.floats(0, 1))
def test_intervals_are_wilsons(count: int, share: float) -> None:
    right = round(share * count)
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert Bin(count, 0.5, right / count).interval() == pytest.approx(expected, abs=1e-4)


def test_an_earlier_sweep_is_kept_unless_told(result: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(result, out, {})
    with pytest.raises(IVONError, match="choose another name with output, or overwrite it with overwrite"):
        check_output(out)
    check_output(out, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(IVONError, match="is not a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(IVONError, match="cannot be written"):
        save(result, tmp_path / "file" / "below", {})


def test_reliability_bins_add_up_to_the_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2, 1)
    scores = Scores.of(p, torch.randint(3, (200,), generator=generator))
    bins = reliability_bins(scores)
    assert sum(one.count for one in bins) == 200
    error = sum(one.count / 200 * abs(one.accuracy - one.confidence) for one in bins if one.count)
    assert error == pytest.approx(metrics(scores)["ece"])
    assert math.isnan(bins[0].accuracy)  # three classes: no confidence is below 1/3
