"""The pictures of a report: what they show, and that a page can hold them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.plots.figures import BLUE
from axolotl_ivon.plots.pictures import (
    draw,
    grid_of,
    heat_map,
    histograms,
    place_of,
    reliability,
    risk_coverage,
    rows_in_order,
    selective_curve,
    sweep_picture,
    width,
)

HOSTILE = '<script>"&amp; $\\frac$ 猫'


def texts(picture: str) -> list[str]:
    """The words of a picture, which must be XML."""
    root = xml.etree.ElementTree.fromstring(picture)
    return ["".join(each.itertext()) for each in root.iter() if each.tag.endswith(("text", "title"))]


def test_colours_are_the_pages_and_names_are_one_pictures() -> None:
    def picture(title: str) -> str:
        figure = Figure(figsize=(2, 1.5))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 5], color=BLUE, marker="o")
        axes.plot([0, 1], [5, 0], color="black")
        return draw(figure, title)

    one, other = picture("one"), picture("other")
    assert "var(--blue)" in one
    assert "currentColor" in one
    assert BLUE not in one
    assert "#000000" not in one
    assert width(one) == 192
    defined = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert defined[0]
    assert not defined[0] & defined[1]
    for text, names in zip((one, other), defined, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == names
    assert one == picture("one"), "a report that is made again is the same"


def test_reliability_tells_the_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2, 1)
    scores = Scores.of(p, torch.randint(3, (200,), generator=generator))
    error = 100 * (metrics(scores)["ece"] or 0)
    words = texts(reliability("mean", scores.confidence.numpy(), scores.correct.numpy()))
    assert {"mean", f"ECE {error:.1f} %, n = 200"} <= set(words)
    assert texts(reliability("x", np.array([1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0])))  # both ends have a bin


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=12))
def test_the_curve_is_that_of_answering_above_each_threshold(pairs: list[tuple[float, bool]]) -> None:
    confidence, right = (np.array(column, float) for column in zip(*pairs, strict=True))
    coverage, risk = selective_curve(confidence, right)
    expected = []
    for threshold in sorted({c for c, _ in pairs}, reverse=True):
        kept = [r for c, r in pairs if c >= threshold]
        expected.append((len(kept) / len(pairs), 1 - sum(kept) / len(kept)))
    assert np.allclose(np.stack([coverage, risk], 1), expected)


def test_names_are_words_and_not_markup() -> None:
    values = np.linspace(0.5, 1, 9)
    right = np.arange(9) % 2
    for picture in (
        reliability(HOSTILE, values, right),
        risk_coverage(HOSTILE, {HOSTILE: (values, right)}, 0.1, (0.5, 0.2)),
        histograms("entropy", values, {HOSTILE: values}, HOSTILE),
        heat_map("σ", {HOSTILE: 1.0}),
    ):
        assert any(HOSTILE in text for text in texts(picture))
        assert "<script" not in picture


def test_rows_of_one_order_share_a_curve() -> None:
    confidence, right = np.array([0.9, 0.8, 0.7]), np.array([1.0, 0.0, 1.0])
    words = texts(risk_coverage("x", {"mean": (confidence, right), "mean+temperature": (confidence**2, right)}, 0.2))
    assert any("mean" in text and "+temperature" not in text for text in words)
    assert any("promised: 20 %" in text for text in words)
    assert sum("mean" in text for text in words) == 2


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
    assert place_of(module) == place


def test_a_heat_map_has_a_cell_for_every_module() -> None:
    values: dict[str, float | None] = {f"model.layers.{i}.{kind}": 0.1 + i for i in range(20) for kind in ("q", "v")}
    picture = heat_map("median σ", {**values, "lm_head": None})
    words = texts(picture)
    assert {"q", "v", "lm_head", "0", "18", "median σ"} <= set(words)
    cells = re.findall(r"<path[^>]*>", picture)
    assert len(cells) >= 40
    assert "data:image" not in picture, "no bitmap"
    for few in ({"a.0.q": 0.5}, {"a.0.q": None}, {"a.0.q": 0.0}, {"a.0.q": 1e-30, "a.1.q": 1e30}):
        assert texts(heat_map("σ", few))


def recommendation(error: float = 0.01, **changes: Any) -> dict[str, Any]:
    grid = [
        {
            "tau": tau,
            "ratio": 0.0,
            "front": True,
            "chosen_on": {"accuracy": 0.8, "ece": 0.1 * float(tau == 1)},
            "reported_on": {"se": {"ece": error}},
        }
        for tau in (1.0, "inf")
    ]
    own = {key: grid[1][key] for key in ("tau", "ratio", "chosen_on", "reported_on")}
    return {**own, "objective": "ece", "grid": grid, **changes}


def test_the_sweep_is_that_of_the_file() -> None:
    result = grid_of(recommendation())
    assert result is not None
    assert (result.recommended.tau, result.objective, result.points[1].tau) == (math.inf, "ece", math.inf)
    picture, told = sweep_picture(result)
    assert not told
    assert any("recommended by ece: τ inf, ratio 0" in text for text in texts(picture))
    noise = grid_of(recommendation(error=0.5))
    assert noise is not None
    assert sweep_picture(noise)[1].startswith("no picture of the trade-off")


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": None},
        {"grid": []},
        {"chosen_on": None},
        {"reported_on": 3, "chosen_on": {}},
        {"grid": [{"tau": 1}]},
        {"tau": "hot"},
        {"grid": [3]},
    ],
)
def test_a_file_without_a_whole_grid_has_no_picture(changes: dict[str, Any]) -> None:
    assert grid_of(recommendation(**changes)) is None


def test_pruned_rows_are_left_out_where_there_are_others() -> None:
    assert rows_in_order(["base", "mean", "mean-pruned"]) == ["base", "mean"]
    assert rows_in_order(["mean-pruned"]) == ["mean-pruned"]
