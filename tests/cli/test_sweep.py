"""`ivon-post sweep` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from pipeline import Pipeline
from tiny import CHAT_TEMPLATE, write_chats
from transformers import AutoTokenizer

from axolotl_ivon import Posterior

SMALL = ["--tau", "1,inf", "--ratio", "0", "--samples", 1]


def test_a_sweep_writes_what_eval_takes(tiny_adapter: Path, pipeline: Pipeline, tmp_path: Path, ivon_post: Cli) -> None:
    out = tmp_path / "out"
    grid = ["sweep", tiny_adapter, "--data", pipeline.chats, "--tau", "0.2,1", "--tau", "inf", "--ratio", "0,0.5"]
    grid += ["--samples", 2, "-o", out]
    result = ivon_post.done(*grid)
    assert "no reliability diagram" in result.stderr  # a handful of examples fill no two bins
    names = ["recommended.json", "trade-off.png", "trade-off.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(str(out / name) in result.stdout for name in names)
    lines = [line.split() for line in result.stdout.splitlines() if line[:6].strip() in ("0.2", "1", "inf")]
    written = json.loads((out / "recommended.json").read_text())
    assert len(lines) == 6 + len(written["scaled"])
    assert sum("front" in line for line in lines) >= 1
    assert sum("best" in line for line in lines) == 1
    # Twelve examples tell nothing: the mean stays.
    assert [line[:3] for line in lines if "recommended" in line] == [["inf", "0", "1"]]
    assert "too few examples: keep the default, the mean" in result.stdout
    assert "only 12 examples choose and 12 report: most differences will be noise; 100 each are better" in result.stderr
    assert len(written["grid"]) == 6
    assert written["data"] == [str(pipeline.chats)]
    header = Posterior.from_pretrained(tiny_adapter).metadata
    assert all(written[name] == header[name] for name in ("mean_sha256", "sigma_sha256"))

    words = ["--recommended", out / "recommended.json", "--samples", 2, "--rows", "mean,posterior"]
    found = ivon_post.json("eval", tiny_adapter, "--data", pipeline.chats, *words)
    assert (found["tau"], found["prune_ratio"]) == (written["draws"]["tau"], written["ratio"])
    # All the data is both halves, as many examples each.
    draws = next(point for point in written["scaled"] if point["tau"] == found["tau"])
    for name, point in (("mean", written), ("posterior+temperature", draws)):
        [nll] = (row["nll"] for row in found["rows"] if row["name"] == name)
        assert nll == pytest.approx((point["chosen_on"]["nll"] + point["reported_on"]["nll"]) / 2, rel=1e-6)

    assert "--overwrite" in ivon_post.error(*grid, "-q")
    ivon_post(*grid, "--overwrite", "--objective", "brier")
    assert json.loads((out / "recommended.json").read_text())["objective"] == "brier"


def test_json_and_default_target(
    tiny_adapter: Path, pipeline: Pipeline, copied: Callable[..., Path], ivon_post: Cli
) -> None:
    folder = copied(tiny_adapter)
    result = ivon_post.run("sweep", f"{folder}/", "--data", pipeline.chats, *SMALL, "--json", "-q")
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result.stderr == ""
    assert sorted(found["files"]) == sorted(map(str, (folder.parent / "adapter-sweep").iterdir()))
    assert found["tau"] in (1.0, "inf")
    assert found["mean_reported_on"] == found["grid"][1]["reported_on"]
    assert found["verdict"]["outcome"] == "too few examples"
    assert "threshold" not in found


def test_a_risk_gives_a_threshold_that_eval_keeps_to(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    # A model that has learned nothing is wrong half of the time.
    chats = write_chats(tmp_path / "chats.jsonl", count=80)
    found = ivon_post.json("sweep", tiny_adapter, "--data", chats, *SMALL, "-o", tmp_path / "o", "--risk", 0.9)
    assert found["examples"] == {"chosen_on": 20, "reported_on": 20}
    assert found["certified_on"]["examples"] == 40
    assert (found["risk"], found["confidence"], found["score"]) == (0.9, 0.9, "probability")
    assert found["certified_on"]["bound"] <= 0.9
    assert found["coverage"] == found["certified_on"]["answered"] / 40

    path = tmp_path / "o" / "recommended.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": 0.55, "temperature": 0.7}))
    words = ["eval", tiny_adapter, "--data", chats, "--recommended", path, "-q", "--samples", 1, "--rows", "mean"]
    rows = ivon_post.json(*words)["rows"]
    assert [row["name"] for row in rows] == ["mean", "mean+temperature", "recommended", "recommended, answered"]
    _, _, whole, answered = rows
    assert whole["temperature"] == 0.7
    assert answered["coverage"] == answered["examples"] / 80
    assert 0 < answered["coverage"] < 1
    assert answered["threshold"] == 0.55
    # What is answered is what --output says is sure enough.
    table = ivon_post(*words, "-o", tmp_path / "examples.jsonl")
    each = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert sum(one["rows"]["recommended"]["confidence"] >= 0.55 for one in each) == answered["examples"]
    assert f"chats.jsonl: {100 * answered['coverage']:.1f} % answered, from confidence 0.55 on" in table


def test_the_weights_of_a_product(make_adapter: Callable[..., Path], tmp_path: Path, ivon_post: Cli) -> None:
    adapters = [make_adapter(seed=seed) for seed in (1, 2)]
    data = [write_chats(tmp_path / f"{name}.jsonl", 12, seed) for seed, name in enumerate("ab")]
    words = ["sweep", "--combine", *adapters, "--data", data[0], "--data", data[1], "-o", tmp_path / "out"]
    result = ivon_post.done(*words)
    assert "a.jsonl: NLL" in result.stdout
    assert sum("front" in line for line in result.stdout.splitlines()[:20]) >= 1
    assert f"next: ivon-post eval {tmp_path / 'out'} --data TEST.jsonl" in result.stderr
    ivon_post("eval", tmp_path / "out", "--data", data[0], "--rows", "mean")
    found = ivon_post.json(*words, "--overwrite")
    assert found["weights"] == [1, 1]
    assert found["adapters"] == list(map(str, adapters))
    assert len(found["points"]) == 9
    assert all(Path(path).exists() for path in found["files"])


def test_chats_are_those_of_eval_with_the_same_arguments_of_the_template(
    tiny_adapter: Path, pipeline: Pipeline, copied: Callable[..., Path], ivon_post: Cli
) -> None:
    folder = copied(tiny_adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ mood }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    def nll(*words: str) -> float:
        found = ivon_post.json("sweep", folder, "--data", pipeline.chats, *SMALL, "--overwrite", *words)
        [row] = ivon_post.json("eval", folder, "--data", pipeline.chats, "--rows", "mean", *words)["rows"]
        [mean] = (point for point in found["grid"] if point["tau"] == "inf")
        halves = [mean[half]["nll"] for half in ("chosen_on", "reported_on")]
        assert sum(halves) / 2 == pytest.approx(row["nll"], rel=1e-6)
        return float(row["nll"])

    assert nll("--chat-template-kwargs", '{"mood": "warm cold "}') != pytest.approx(nll(), rel=1e-4)
