"""`ivon-post info`: what is in a folder, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def test_info_shows_modules_facts_and_histogram(tiny_adapter: Path, ivon_post):
    text = ivon_post("info", tiny_adapter, "--ratio", 0.5)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0][:2] == ["module", "weights"]
    modules = [line for line in lines if line[0].startswith("model.layers")]
    assert [line[1] for line in modules] == ["256", "192", "256", "192"]
    assert ["weights", "896"] in lines
    assert ["prior", "empirical"] in lines
    assert "448 weights are 0 after pruning 0.5 by snr" in text
    bars = [line for line in text.splitlines() if "█" in line]
    assert bars
    shares = [float(line.split()[-1].rstrip("%")) for line in text.split("|m|/σ from\n")[1].splitlines()]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_info_as_json(tiny_adapter: Path, ivon_post):
    facts = ivon_post.json("info", tiny_adapter)
    assert (facts["weights"], facts["would_prune"], len(facts["modules"])) == (896, 90, 4)
    assert facts["header"]["prior"] == "empirical"


def test_info_without_sigma(make_adapter: Callable, ivon_post):
    text = ivon_post("info", make_adapter(sigma=False))
    assert "`info` and `merge` work on this adapter" in text
    assert "model.layers.1.self_attn.v_proj" in text


def test_numbers_in_json_are_numbers(tiny_adapter: Path, ivon_post):
    header = ivon_post.json("info", tiny_adapter)["header"]
    numbers = {
        "ess": 1000.0,
        "gamma": 100.0,
        "train_size": 100,
        "h0": 0.05,
        "steps": 10,
        "tau": 1.0,
        "pruned_ratio": 0.0,
    }
    assert {name: header[name] for name in numbers} == numbers
    assert {name: type(header[name]) for name in numbers} == {name: type(value) for name, value in numbers.items()}
    texts = ("prior", "mean_sha256", "library_version", "format")
    assert all(isinstance(header[name], str) for name in texts)


def test_what_is_inside_is_named(tiny_adapter: Path, tmp_path: Path, ivon_post):
    ivon_post("sample", tiny_adapter, "-n", 2, "-o", tmp_path / "e")
    line = ivon_post.error("info", tmp_path / "e")
    assert line.endswith(
        f"an ensemble of 2 adapters: give one of them, {tmp_path}/e/sample-0000, {tmp_path}/e/sample-0001"
    )
