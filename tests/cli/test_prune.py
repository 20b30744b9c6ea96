"""`ivon-post prune`: the library's pruning, written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bad_inputs import FOLDERS, BadInputs

from axolotl_ivon import Posterior

MEAN_FILE = "adapter_model.safetensors"


def same(a: Posterior, b: Posterior) -> bool:
    return all(torch.equal(a.mean[key], b.mean[key]) and torch.equal(a.sigma[key], b.sigma[key]) for key in a.mean)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def recommendation(folder: Path, **facts: object) -> Path:
    path = folder / "recommended.json"
    path.write_text(json.dumps({"tau": 3.0, "ratio": 0.4, **facts}))
    return path


@pytest.mark.parametrize(
    "options", [{}, {"criterion": "magnitude"}, {"criterion": "random", "seed": 3}, {"scope": "tensor"}]
)
def test_prune(options: dict, tiny_adapter: Path, out: Path, ivon_post):
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    text = ivon_post("prune", tiny_adapter, "--ratio", 0.3, "-o", out, *words)
    assert text.splitlines()[-1] == str(out)
    q = Posterior.from_pretrained(out)
    assert same(q, Posterior.from_pretrained(tiny_adapter).prune(0.3, **options))
    assert text.startswith(f"{sum(q.pruned().values())} of 896 weights are 0")


def test_prune_as_json_and_its_default(tiny_adapter: Path, out: Path, ivon_post):
    facts = ivon_post.json("prune", tiny_adapter, "-o", out)
    expected = {"output": str(out), "ratio": 0.1, "criterion": "snr", "scope": "adapter", "pruned": 90, "weights": 896}
    assert facts == expected


def test_prune_takes_a_recommendation(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post):
    file = recommendation(tmp_path)
    assert ivon_post.json("prune", tiny_adapter, "-o", out, "--recommended", file)["ratio"] == 0.4
    again = ivon_post.json("prune", tiny_adapter, "-o", out, "--overwrite", "--recommended", file, "--ratio", 0.2)
    assert again["ratio"] == 0.2


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_folders(damage: str, bad_inputs: BadInputs):
    bad_inputs.damaged(damage, "prune", "BAD")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("prune", "missing"), "missing: no such folder", id="missing folder"),
        pytest.param(("prune", f"adapter/{MEAN_FILE}"), "is a file; give the adapter's folder", id="a file"),
        pytest.param(("prune", "adapter", "--ratio", 1.1), "ratio 1.1 is outside [0, 1]", id="ratio above 1"),
        pytest.param(("prune", "adapter", "--ratio", -0.1), "ratio -0.1 is outside [0, 1]", id="ratio below 0"),
        pytest.param(("prune", "adapter", "--ratio", "nan"), "ratio nan is outside [0, 1]", id="ratio is NaN"),
        pytest.param(
            ("prune", "adapter", "--criterion", "best"),
            "criterion 'best' is unknown; choose one of",
            id="unknown criterion",
        ),
        pytest.param(("prune", "adapter", "-o", "there"), "there exists; choose another name", id="target exists"),
        pytest.param(("prune", "adapter", "-o", "file", "--overwrite"), "file is not a folder", id="target is a file"),
        pytest.param(
            ("prune", "adapter", "-o", "home", "--overwrite"), "holds something other", id="target is something else"
        ),
        pytest.param(("prune", "adapter", "-o", "adapter", "--overwrite"), "never modified", id="target is the input"),
        pytest.param(("prune", "adapter", "--recommended", "none.json"), "none.json", id="missing recommendation"),
    ],
)
def test_bad_arguments(words: tuple[object, ...], message: str, bad_inputs: BadInputs):
    bad_inputs.argument(words, message)
