"""The pictures: what they show, that they become files, and that a page can hold them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from measurements import recommendation
from scipy.stats import binomtest

from axolotl_ivon import IVONError
from axolotl_ivon.decisions.weights import WeightsPoint
from axolotl_ivon.generation.mbr import CurvePoint
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.plots.page import heat_map, histograms, memory_map, risk_coverage, split_module
from axolotl_ivon.plots.reliability import Bins, reliability, too_few
from axolotl_ivon.plots.scaling import scaling
from axolotl_ivon.plots.style import BLUE, INK, house_style, new_figure, save_figures, to_svg
from axolotl_ivon.plots.sweep import save_sweep, trade_off, weights_front
from axolotl_ivon.records.recommendation import Recommendation

HOSTILE = '<script>"&amp; $\\frac$ 猫'


def made(count: int, sharpness: float = 1.0) -> Scores:
    """Scores of `count` predictions between three classes; at sharpness 1 they are calibrated."""
    generator = torch.Generator().manual_seed(count)
    logits = 1.5 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return Scores.of((sharpness * logits).softmax(1), target)


def arrays(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    return scores.confidence.numpy(), scores.correct.numpy()


def texts(figure: Figure | str) -> list[str]:
    """The words of a picture in a page, which must be XML."""
    assert isinstance(figure, Figure)
    root = xml.etree.ElementTree.fromstring(to_svg(figure))
    return ["".join(each.itertext()) for each in root.iter() if each.tag.endswith(("text", "title"))]


def test_figures_become_files(tmp_path: Path) -> None:
    reporter = Heard()
    figures = {"a.b": Figure(), "c": "nothing to see"}
    png, svg = save_figures(figures, tmp_path, reporter)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [png.name, svg.name] == ["a.b.png", "a.b.svg"]
    assert imread(png)[0, 0].tolist() == [1, 1, 1, 1], "white"
    assert b"<svg" in svg.read_bytes()
    # An earlier run's picture would be taken for this one's.
    assert save_figures({"a.b": "no more"}, tmp_path, reporter) == []
    assert not list(tmp_path.iterdir())
    assert reporter.notes == ["nothing to see", "no more"]
    (tmp_path / "file").touch()
    with pytest.raises(IVONError, match="cannot be written"):
        save_figures({"x": Figure()}, tmp_path / "file")


def test_colours_are_the_pages_and_names_are_one_pictures() -> None:
    @house_style
    def picture(title: str) -> str:
        figure, axes = new_figure(title, 2, 1.5)
        axes.plot([0, 1], [0, 5], color=BLUE, marker="o")
        axes.plot([0, 1], [5, 0], color="black")
        return to_svg(figure)

    one, other = picture("one"), picture("other")
    assert "var(--blue)" in one
    assert "currentColor" in one
    assert "--natural: 192px" in one
    assert not any(color in one for color in (BLUE, INK, "#000000"))
    defined = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert defined[0]
    assert not defined[0] & defined[1]
    for text, names in zip((one, other), defined, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == names
    assert one == picture("one"), "a report that is made again is the same"


def test_names_are_words_and_not_markup() -> None:
    values = np.linspace(0.5, 1, 9), np.arange(9) % 2
    for figure in (
        reliability({HOSTILE: values}),
        risk_coverage(HOSTILE, {HOSTILE: values}, 0.1, (0.5, 0.2)),
        histograms("entropy", values[0], {HOSTILE: values[0]}, HOSTILE),
        heat_map("σ", {HOSTILE: 1.0}),
    ):
        assert any(HOSTILE in text for text in texts(figure))
        assert "<script" not in to_svg(figure)


@given(st.integers(1, 200), st.floats(0, 1))
def test_intervals_are_wilsons(count: int, share: float) -> None:
    right = np.arange(count) < round(share * count)
    bins = Bins.of(np.full(count, 0.5), right)
    expected = binomtest(int(right.sum()), count).proportion_ci(method="wilson")
    assert (bins.low[0], bins.high[0]) == pytest.approx(tuple(expected), abs=1e-4)


def test_bins_add_up_to_the_calibration_error() -> None:
    scores = made(200, 2)
    bins = Bins.of(*arrays(scores))
    assert bins.counts.sum() == 200
    assert bins.calibration_error == pytest.approx(metrics(scores)["ece"])
    assert bins.middle[0] > 0.3, "of three classes no confidence is below 1/3, and an empty bin is left out"
    assert {"mean", f"ECE {100 * bins.calibration_error:.1f} %, n = 200"} <= set(
        texts(reliability({"mean": arrays(scores)}))
    )
    assert Bins.of(np.array([1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0])).counts.tolist() == [1, 2]


def test_a_reliability_diagram_says_how_sure_it_is() -> None:
    scores = made(150, 2)
    figure = reliability({"mean": arrays(scores)}, counts=True)
    top, bottom = figure.axes
    bins = Bins.of(*arrays(scores))
    telling = bins.where(bins.counts >= 5)
    assert 0 < len(telling.counts) < len(bins.counts)
    [errors] = [container for container in top.containers if isinstance(container, ErrorbarContainer)]
    ends = [segment[:, 1].tolist() for segment in errors.lines[2][0].get_segments()]
    assert ends == [pytest.approx(pair) for pair in zip(telling.low, telling.high, strict=True)]
    [hollow] = [line for line in top.get_lines() if line.get_markerfacecolor() == "none" and line.get_marker() == "o"]
    assert list(hollow.get_ydata()) == bins.accuracy[bins.counts < 5].tolist()
    assert [text.get_text() for text in bottom.texts] == [str(count) for count in bins.counts]
    tokens = reliability({"mean": arrays(made(300))}, examples=150)
    assert "n = 300 tokens of 150 answers" in tokens.axes[0].get_title()


def test_variants_of_one_order_share_a_curve() -> None:
    confidence, right = np.array([0.9, 0.8, 0.7]), np.array([1.0, 0.0, 1.0])
    words = texts(risk_coverage("x", {"mean": (confidence, right), "mean+temperature": (confidence**2, right)}, 0.2))
    assert any("mean" in text and "+temperature" not in text for text in words)
    assert any("promised: 20 %" in text for text in words)
    assert sum("mean" in text for text in words) == 2


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """A function that saves a sweep, and returns the names of the files and what was notified."""

    def save(sweep: Recommendation, count: int) -> tuple[list[str], list[str]]:
        reporter = Heard()
        scores = {"mean": made(count, 3), "posterior": made(count), "recommended": made(count, 0.8)}
        files = save_sweep(sweep, scores, tmp_path / "a" / "out", reporter)
        assert {*files} == {*(tmp_path / "a" / "out").iterdir()}
        return [path.name for path in files], reporter.notes

    return save


def test_a_sweep_is_saved_with_its_pictures(saved: Any, tmp_path: Path) -> None:
    names, messages = saved(recommendation(0.01), 300)
    pictures = [f"{name}.{kind}" for name in ("trade-off", "reliability") for kind in ("png", "svg")]
    assert (names, messages) == (["recommended.json", *pictures], [])
    for name in pictures:
        path = tmp_path / "a" / "out" / name
        if path.suffix == ".png":
            assert imread(path).shape[0] > 400
            assert imread(path).std() > 0.05
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
    written = json.loads((tmp_path / "a" / "out" / "recommended.json").read_text(), parse_constant=pytest.fail)
    assert [point["tau"] for point in written["grid"]] == 2 * [0.5, 2.0, "inf"]
    assert Recommendation.load(tmp_path / "a" / "out" / "recommended.json", "sweep") == recommendation(0.01)


def test_where_nothing_is_to_be_seen_there_is_no_picture(saved: Any) -> None:
    saved(recommendation(0.01), 300)
    names, (first, second) = saved(recommendation(0.5), 6)
    assert names == ["recommended.json"]
    assert first == (
        "no picture of the trade-off: over the grid ECE differs by 3.0 % and accuracy by 4.0 %, no more than their "
        "standard errors of 50.0 and 50.0 %"
    )
    assert second == "no reliability diagram: no two bins of confidence have 5 predictions or more"


def test_the_trade_off_shows_the_grid_and_the_choice() -> None:
    words = texts(trade_off(recommendation(0.01, tau="inf", objective="ece")))
    assert any("recommended by ece: the mean" in text for text in words)
    assert {"τ 0.5", "τ 2", "τ ∞", "r 0.3"} <= set(words)
    assert "no grid" in str(trade_off(recommendation(grid=[])))
    assert "no grid" in str(trade_off(recommendation(chosen_on={"accuracy": 0.8})))
    with pytest.raises(IVONError, match=r"grid\[0\]: it has no `ratio`"):
        recommendation(grid=[{"tau": 1}])


def test_the_front_of_two_files_is_marked() -> None:
    points = [
        WeightsPoint((a, 2 - a), {"x": {"nll": a}, "y": {"nll": 2 - a}}, {}, front=a < 2) for a in (0.0, 1.0, 2.0)
    ]
    axes = weights_front(points, points[1], "nll").axes[0]
    every, front, chosen = (line.get_xydata().tolist() for line in axes.lines)
    assert (every, front, chosen) == ([[0, 2], [1, 1], [2, 0]], [[0, 2], [1, 1]], [[1, 1]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("NLL on x", "NLL on y")


def test_the_scaling_curve_has_every_point() -> None:
    values = {"mean": {8: 0.5, 16: 0.6}, "posterior": {8: 0.55, 16: 0.7}}
    points = {label: [CurvePoint(n, share, 0.1, 0) for n, share in curve.items()] for label, curve in values.items()}
    axes = scaling(points).axes[0]
    drawn = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axes.containers}
    assert drawn == {label: pytest.approx([100 * share for share in curve.values()]) for label, curve in values.items()}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16"]
    for container in axes.containers:
        assert container.lines[0].get_xdata() == pytest.approx([8, 16], rel=0.02)


def test_no_two_scaling_curves_look_the_same() -> None:
    axes = scaling({str(number): [CurvePoint(8, 0.5, 0.1, 0)] for number in range(12)}).axes[0]
    lines = [container.lines[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 12


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("layers.3.mlp", (3, "mlp")),
        ("lm_head", (None, "lm_head")),
        ("experts.0.1.w", (0, "1.w")),
    ],
)
def test_a_module_has_its_layer(module: str, place: tuple[int | None, str]) -> None:
    assert split_module(module) == place


def test_a_heat_map_has_a_cell_for_every_module() -> None:
    values: dict[str, float | None] = {f"model.layers.{i}.{kind}": 0.1 + i for i in range(20) for kind in ("q", "v")}
    figure = heat_map("median σ", {**values, "lm_head": None})
    assert {"q", "v", "lm_head", "0", "18", "median σ"} <= set(texts(figure))
    picture = to_svg(figure)
    assert len(re.findall(r"<path[^>]*>", picture)) >= 40
    assert "data:image" not in picture, "no bitmap"
    for few in ({"a.0.q": 0.5}, {"a.0.q": None}, {"a.0.q": 0.0}, {"a.0.q": 1e-30, "a.1.q": 1e30}):
        assert texts(heat_map("σ", few))


def test_rows_that_stand_out_are_marked_and_a_histogram_has_both_ends() -> None:
    every, marked = memory_map(np.array([1.0, 2.0, 3.0]), np.ones(3), np.array([False, True, True])).axes[0].collections
    assert (every.get_offsets()[:, 0].tolist(), marked.get_offsets()[:, 0].tolist()) == ([1.0], [2.0, 3.0])

    constant = histograms("entropy", np.ones(4), {"x": np.ones(3), "y": np.ones(2)})
    heights = [patch.get_height() for patch in constant.axes[0].patches if hasattr(patch, "get_height")]
    assert max(heights) == pytest.approx(100)
    constant.draw_without_rendering()
    [legend], [axes] = constant.legends, constant.axes
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert constant.bbox.containsx(legend.get_window_extent().x0)
    assert constant.bbox.containsy(legend.get_window_extent().y0)
    assert too_few({"x": (np.ones(9), np.ones(9))}).startswith("no reliability diagram")
