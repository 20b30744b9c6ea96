"""`ivon-post temper`: the library's temperature, written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from bad_inputs import BadInputs

from axolotl_ivon import Posterior

MEAN_FILE = "adapter_model.safetensors"


def same(a: Posterior, b: Posterior) -> bool:
    return all(torch.equal(a.mean[key], b.mean[key]) and torch.equal(a.sigma[key], b.sigma[key]) for key in a.mean)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_temper(tiny_adapter: Path, out: Path, ivon_post):
    assert ivon_post("temper", tiny_adapter, "--tau", 2.5, "-o", out).splitlines() == ["τ is 2.5", str(out)]
    assert same(Posterior.from_pretrained(out), Posterior.from_pretrained(tiny_adapter).temper(2.5))
    assert (out / MEAN_FILE).stat().st_size > 0
    assert ivon_post.json("temper", out, "--tau", 2, "-o", out.parent / "more")["tau"] == 5.0


def test_temper_to_the_mean(tiny_adapter: Path, out: Path, ivon_post):
    ivon_post("temper", tiny_adapter, "--tau", "inf", "-o", out)
    q = Posterior.from_pretrained(out)
    assert q.tau == math.inf
    assert not any(sigma.any() for sigma in q.sigma.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("temper", "adapter", "--tau", 0), "tau 0.0 is not > 0", id="tau is 0"),
        pytest.param(("temper", "adapter", "--tau", -2), "tau -2.0 is not > 0", id="tau is negative"),
        pytest.param(("temper", "adapter", "--tau", "nan"), "tau nan is not > 0", id="tau is NaN"),
        pytest.param(("temper", "adapter", "--tau", "1e-300"), "makes σ of", id="tau too small"),
        pytest.param(("temper", "adapter"), "no temperature", id="no tau"),
        pytest.param(
            ("temper", "adapter", "--tau", 2, "-o", "file/x"), "file/x cannot be written", id="target cannot be written"
        ),
    ],
)
def test_bad_arguments(words: tuple[object, ...], message: str, bad_inputs: BadInputs):
    bad_inputs.argument(words, message)


def test_a_temperature_that_changes_nothing_says_so(tiny_adapter: Path, tmp_path: Path, ivon_post):
    told = {}
    for name, source, tau in (("one", tiny_adapter, 1), ("inf", tiny_adapter, "inf"), ("more", tmp_path / "inf", 2)):
        told[name] = "changes nothing" in ivon_post.run("temper", source, "--tau", tau, "-o", tmp_path / name).stderr
    assert told == {"one": True, "inf": False, "more": True}
    assert ivon_post.json("temper", tmp_path / "inf", "--tau", 2, "-o", tmp_path / "x")["tau"] == "inf"
