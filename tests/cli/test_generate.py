"""`ivon-post generate` as a user calls it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from pipeline import Pipeline
from tiny import build_classifier, with_sigma

from axolotl_ivon.generation import local

SMALL = ["-n", 4, "--per-model", 2, "--max-tokens", 6, "--limit", 4]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_is_resumed(ivon_post: Cli, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    command = ["generate", pipeline.adapter, "-p", pipeline.chats, *SMALL, "-o", path]
    shutil.copy(f"{pipeline.outputs}.settings.json", f"{path}.settings.json")
    path.write_bytes(b"".join(pipeline.outputs.read_bytes().splitlines(True)[:2]) + b'{"prompt": "half a li')
    loud = ivon_post.run(*command)
    assert "4 prompts (2 were there), 4 outputs each from 2 draws, seed 0" in loud.stdout
    assert "tokens/s" in loud.stderr
    assert "tokens/s" not in loud.stdout
    assert path.read_bytes() == pipeline.outputs.read_bytes()
    lines = read(path)
    chats = [json.loads(line) for line in pipeline.chats.read_text().splitlines()]
    assert [line["reference"] for line in lines] == [chat["messages"][-1]["content"] for chat in chats[:4]]
    assert all(line["prompt"].endswith("<|im_start|>assistant\n") for line in lines)
    assert all([output["member"] for output in line["outputs"]] == [0, 0, 1, 1] for line in lines)

    monkeypatch.setattr(local, "TransformersEngine", None)  # a complete file needs no model
    document = ivon_post.json(*command)
    expected = {"output": str(path), "prompts": 4, "resumed": 4, "members": 2, "n": 4, "per_model": 2, "tokens": 0}
    assert {key: document[key] for key in expected} == expected


def test_a_line_has_a_confidence_and_may_abstain(ivon_post: Cli, pipeline: Pipeline, tmp_path: Path) -> None:
    recommended, path = tmp_path / "recommended.json", tmp_path / "out.jsonl"
    recommended.write_text(json.dumps({"tau": 0.5, "ratio": 0.3, "threshold": 0.3, "temperature": 1.5}))
    command = ["generate", pipeline.adapter, "-p", pipeline.chats, *SMALL, "-a", "[a-z]", "-o", path]
    document = ivon_post.json(*command, "--recommended", recommended)
    assert document["tokens"] > 0
    lines = read(path)
    for line in lines:
        last = [(re.findall("[a-z]", output["text"]) or [None])[-1] for output in line["outputs"]]
        votes = Counter(last)
        alone = votes.pop(None, 0)  # no answer agrees with nothing
        shares = [n / 4 for n in votes.values()] + [1 / 4] * alone
        assert line["confidence"] == pytest.approx(max(shares) ** (1 / 1.5) / sum(s ** (1 / 1.5) for s in shares))
        assert line["semantic_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares))
        assert line["expected_entropy"] + line["mutual_information"] == pytest.approx(line["semantic_entropy"])
        assert line["abstain"] == (line["confidence"] < 0.3)
    assert document["coverage"] == 1 - sum(line["abstain"] for line in lines) / 4
    again = ivon_post.run(*command, "--recommended", recommended, "--quiet")  # all are there: what they say counts
    assert f"answers {100 * document['coverage']:.1f} %, and abstains below confidence 0.3" in again.stdout
    assert again.stderr == ""
    refusal = ivon_post.error(*command, "--tau", 0.5, "--prune-ratio", 0.3, "-q")
    assert "made with abstain [0.3, 1.5], not None" in refusal


def test_a_classifier_writes_no_text(ivon_post: Cli, pipeline: Pipeline, tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_sigma(build_classifier(tiny_llama, tmp_path / "head"))
    for words in (["generate", folder, "-p", pipeline.chats, *SMALL, "-o", tmp_path / "x.jsonl"], ["serve", folder]):
        line = ivon_post.error(*words)
        assert (
            line
            == f"Error: {folder} has a classification head and writes no text; `ivon-post predict` labels texts with it"
        )
    assert not list(tmp_path.glob("x.jsonl*"))


def test_the_engine_gets_ratio_and_tau(ivon_post: Cli, pipeline: Pipeline, plain_adapter: Path, tmp_path: Path) -> None:
    def texts(name: str, *options: object, adapter: Path = pipeline.adapter) -> list[list[str]]:
        ivon_post("generate", adapter, "-p", pipeline.chats, *SMALL, "-o", tmp_path / name, *options)
        return [[output["text"] for output in line["outputs"]] for line in read(tmp_path / name)]

    mean = texts("mean", "--mean")
    assert mean == texts("cold", "--tau", "inf", "--per-model", 4)
    assert mean == texts("plain", "--mean", adapter=plain_adapter)
    recommended = tmp_path / "recommended.json"
    recommended.write_text('{"tau": 0.5, "ratio": 0.3}')
    pruned = texts("pruned", "--tau", 0.5, "--ratio", 0.3)
    assert pruned == texts("recommended", "--recommended", recommended)
    posterior = [[output["text"] for output in line["outputs"]] for line in pipeline.read("outputs")]
    assert pruned not in (mean, posterior, texts("tempered", "--tau", 0.5))
