"""`ivon-post merge`: models of the mean, of pruned means and of draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs import BadInputs
from safetensors.torch import load_file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_merge(make_adapter: Callable, out: Path, ivon_post):
    from transformers import AutoModelForCausalLM

    folder = make_adapter(sigma=False)
    assert ivon_post("merge", folder, "-o", out, "--dtype", "bfloat16") == f"{out}\n"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    for option in ("--ratio", "--sample-seed"):
        assert "it is no posterior" in ivon_post.error("merge", folder, "-o", f"{out}2", option, 0)


def test_merge_of_draws_and_pruned_means(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post):
    weights = {}
    for name, words in {
        "mean": (),
        "pruned": ("--ratio", 0.9),
        "draw": ("--sample-seed", 1),
        "again": ("--sample-seed", 1),
        "other": ("--sample-seed", 2),
    }.items():
        ivon_post("merge", tiny_adapter, "-o", tmp_path / name, *words)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weights["draw"], weights.pop("again"))
    names = list(weights)
    assert not any(torch.equal(weights[a], weights[b]) for i, a in enumerate(names) for b in names[:i])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("merge", "adapter", "--base-model", "./none"), "cannot be loaded", id="no base model"),
    ],
)
def test_bad_arguments(words: tuple[object, ...], message: str, bad_inputs: BadInputs):
    bad_inputs.argument(words, message)


def test_a_draw_at_a_temperature_and_a_recommendation(tiny_adapter: Path, tmp_path: Path, ivon_post):
    file = tmp_path / "recommended.json"
    file.write_text('{"tau": 4.0, "ratio": 0.3}')
    weights = {}
    for name, words in {
        "told": ("--sample-seed", 1, "--tau", 4, "--ratio", 0.3),
        "recommended": ("--sample-seed", 1, "--recommended", file),
        "another": ("--sample-seed", 1, "--prune-ratio", 0.3),
    }.items():
        ivon_post("merge", tiny_adapter, "-o", tmp_path / name, *words)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weights["told"], weights["recommended"])
    assert not torch.equal(weights["told"], weights["another"])
