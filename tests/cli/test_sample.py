"""`ivon-post sample`: the library's draws, written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bad_inputs import BadInputs
from safetensors.torch import load_file

from axolotl_ivon import Posterior

MEAN_FILE = "adapter_model.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def recommendation(folder: Path, **facts: object) -> Path:
    path = folder / "recommended.json"
    path.write_text(json.dumps({"tau": 3.0, "ratio": 0.4, **facts}))
    return path


def test_sample(tiny_adapter: Path, out: Path, ivon_post):
    words = ("-n", 2, "--seed", 7, "--tau", 2, "--ratio", 0.3, "--include-mean", "-o", out)
    assert ivon_post("sample", tiny_adapter, *words).splitlines() == ["3 adapters, seed 7", str(out)]
    q = Posterior.from_pretrained(tiny_adapter).prune(0.3).temper(2)
    facts = json.loads((out / "ensemble.json").read_text())
    assert facts["members"] == ["mean", "sample-0000", "sample-0001"]
    assert (facts["source"], facts["seed"], facts["tau"], facts["pruned_ratio"]) == (str(tiny_adapter), 7, 2.0, 0.3)
    for name, expected in (("mean", dict(q.mean)), ("sample-0001", q.sample(7, 1))):
        saved = load_file(out / name / MEAN_FILE)
        assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_sample_takes_a_recommendation(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post):
    ivon_post("sample", tiny_adapter, "-n", 1, "-o", out, "--recommended", recommendation(tmp_path, tau="inf"))
    facts = json.loads((out / "ensemble.json").read_text())
    assert (facts["tau"], facts["pruned_ratio"]) == ("inf", 0.4)
    assert ivon_post.json("sample", tiny_adapter, "-n", 1, "-o", out, "--overwrite")["members"] == ["sample-0000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("sample", "adapter", "--tau", 0), "tau 0.0 is not > 0", id="tau of a draw"),
        pytest.param(("sample", "adapter", "--ratio", 2), "ratio 2.0 is outside", id="ratio of a draw"),
        pytest.param(("sample", "adapter", "-n", 0), "0 members make no ensemble", id="no members"),
        pytest.param(("sample", "adapter", "-o", ".", "--overwrite"), "never modified", id="target holds the input"),
        pytest.param(
            ("sample", "adapter", "-n", 1, "-o", "/proc/x"), "/proc/x cannot be written", id="target in no file system"
        ),
    ],
)
def test_bad_arguments(words: tuple[object, ...], message: str, bad_inputs: BadInputs):
    bad_inputs.argument(words, message)


def test_what_it_takes_is_told(tiny_adapter: Path, out: Path, ivon_post, monkeypatch: pytest.MonkeyPatch):
    assert " take " not in ivon_post.run("sample", tiny_adapter, "-n", 2, "-o", f"{out}1").stderr
    monkeypatch.setattr("ivon_post.sample._LARGE", 7000)
    told = ivon_post.run("sample", tiny_adapter, "-n", 2, "--tau", "inf", "-o", out).stderr.splitlines()
    assert told == [
        f"2 adapters take 7.17 kB in {out}",
        "τ is inf: every draw is the mean",
        f"next: ivon-post info {out}/sample-0000",
    ]
    assert ivon_post.run("sample", tiny_adapter, "-n", 2, "-o", f"{out}2", "-q").stderr == ""
