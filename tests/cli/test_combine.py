"""`ivon-post combine`: the library's combinations, written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs import BadInputs

from axolotl_ivon import Posterior


def same(a: Posterior, b: Posterior) -> bool:
    return all(torch.equal(a.mean[key], b.mean[key]) and torch.equal(a.sigma[key], b.sigma[key]) for key in a.mean)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_combine(tiny_adapter: Path, make_adapter: Callable, out: Path, ivon_post):
    other = make_adapter(seed=1)
    both = [Posterior.from_pretrained(tiny_adapter), Posterior.from_pretrained(other)]
    assert ivon_post("combine", tiny_adapter, other, "-o", out) == f"{out}\n"
    assert same(Posterior.from_pretrained(out), Posterior.combine(both))
    words = ("--method", "linear", "--weights", "0.2,0.8", "--overwrite", "-o", out)
    assert ivon_post.json("combine", tiny_adapter, other, *words)["method"] == "linear"
    assert same(Posterior.from_pretrained(out), Posterior.combine(both, "linear", [0.2, 0.8]))


def test_combine_by_concatenation_is_an_adapter_again(tiny_adapter: Path, make_adapter: Callable, out: Path, ivon_post):
    ivon_post("combine", tiny_adapter, make_adapter(r=8, seed=1), "--method", "cat", "-o", out)
    facts = ivon_post.json("info", out)
    assert (facts["r"], facts["weights"], facts["header"]["combined"]) == (12, 3 * 896, "cat of 2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("combine", "adapter"), "1 posterior cannot be combined", id="one posterior"),
        pytest.param(
            ("combine", "adapter", "adapter", "--weights", "1,-1"),
            "those of precisions are 0 or more",
            id="a negative weight for precision",
        ),
        pytest.param(
            ("combine", "adapter", "adapter", "--method", "linear", "--weights", "1"),
            "do not fit 2",
            id="too few weights",
        ),
    ],
)
def test_bad_arguments(words: tuple[object, ...], message: str, bad_inputs: BadInputs):
    bad_inputs.argument(words, message)
