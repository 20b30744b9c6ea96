"""`ivon-post prune`: the library's pruning, written."""

from __future__ import annotations

import json
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


def recommendation(folder: Path, **facts: object) -> Path:
    path = folder / "recommended.json"
    path.write_text(json.dumps({"tau": 3.0, "ratio": 0.4, **facts}))
    return path


@pytest.mark.parametrize("options", [{}, {"criterion": "magnitude"}, {"criterion": "random"}, {"scope": "tensor"}])
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


def test_a_prune_that_changes_nothing_or_everything_says_so(tiny_adapter: Path, tmp_path: Path, ivon_post):
    def told(source: Path, ratio: float, name: str) -> str:
        return ivon_post.run("prune", source, "--ratio", ratio, "-o", tmp_path / name).stderr

    assert "ratio 0 prunes nothing: " in told(tiny_adapter, 0, "a")
    assert "prunes" not in told(tiny_adapter, 0.1, "b")
    assert "ratio 0.1 prunes nothing; 0.1 of the weights were pruned before: " in told(tmp_path / "b", 0.1, "c")
    assert same(Posterior.from_pretrained(tmp_path / "b"), Posterior.from_pretrained(tmp_path / "c"))
    assert "ratio 1 prunes every weight" in told(tiny_adapter, 1, "d")


def test_what_was_recommended_is_what_comes_out_in_any_order(tiny_adapter: Path, tmp_path: Path, ivon_post):
    """`prune` and `temper`, in either order, and once too often: the posterior that was evaluated, and no other."""
    fingerprint = Posterior.from_pretrained(tiny_adapter).metadata["mean_sha256"]
    file = recommendation(tmp_path, mean_sha256=fingerprint)
    expected = Posterior.from_pretrained(tiny_adapter).prune(0.4).temper(3)
    for order in (("prune", "temper"), ("temper", "prune"), ("prune", "temper", "prune", "temper")):
        source = tiny_adapter
        for step, command in enumerate(order):
            target = tmp_path / "-".join(order) / str(step)
            ivon_post(command, source, "--recommended", file, "-o", target)
            source = target
        q = Posterior.from_pretrained(source)
        assert same(q, expected)
        assert (q.tau, q.pruned_ratio) == (3, 0.4)
    other = recommendation(tmp_path, mean_sha256="0" * 64)
    assert "was chosen for another adapter" in ivon_post.error("prune", tiny_adapter, "--recommended", other)
