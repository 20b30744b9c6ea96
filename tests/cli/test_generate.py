"""`ivon-post generate` as a user calls it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from tiny import write_chats

from axolotl_ivon import IVONError
from axolotl_ivon.generation import local, nbest

SMALL = ["-n", 4, "--per-model", 2, "--max-tokens", 6]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 4)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_per_prompt_with_its_reference(ivon_post: Cli, tiny_adapter: Path, chats: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    found = ivon_post.json("generate", tiny_adapter, "-p", chats, *SMALL, "-o", path)
    expected = {"output": str(path), "prompts": 4, "resumed": 0, "members": 2, "n": 4, "per_model": 2}
    assert {key: found[key] for key in expected} == expected
    lines = read(path)
    assert [line["reference"] for line in lines] == [
        json.loads(line)["messages"][-1]["content"] for line in chats.read_text().splitlines()
    ]
    assert all(line["prompt"].endswith("<|im_start|>assistant\n") for line in lines)
    assert all([output["member"] for output in line["outputs"]] == [0, 0, 1, 1] for line in lines)
    assert found["tokens"] > 0


def test_a_line_says_how_sure_its_outputs_are_and_abstains_below_the_threshold(
    ivon_post: Cli, tiny_adapter: Path, chats: Path, tmp_path: Path
) -> None:
    recommended = tmp_path / "recommended.json"
    facts = {"tau": 0.5, "ratio": 0.3, "threshold": 0.3, "temperature": 1.5}
    recommended.write_text(json.dumps(facts))
    options = [*SMALL, "-a", "[a-z]", "--recommended", recommended, "-o", tmp_path / "out.jsonl"]
    found = ivon_post.json("generate", tiny_adapter, "-p", chats, *options)
    lines = read(tmp_path / "out.jsonl")
    for line in lines:
        last = [(re.findall("[a-z]", output["text"]) or [None])[-1] for output in line["outputs"]]
        votes = Counter(last)
        alone = votes.pop(None, 0)  # no answer agrees with nothing
        shares = [n / 4 for n in votes.values()] + [1 / 4] * alone
        assert line["confidence"] == pytest.approx(max(shares) ** (1 / 1.5) / sum(s ** (1 / 1.5) for s in shares))
        assert line["semantic_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares))
        assert line["expected_entropy"] + line["mutual_information"] == pytest.approx(line["semantic_entropy"])
        assert line["abstain"] == (line["confidence"] < 0.3)
    assert found["coverage"] == 1 - sum(line["abstain"] for line in lines) / 4
    told = ivon_post("generate", tiny_adapter, "-p", chats, *options)  # all are there: what they say counts
    assert f"answers {100 * found['coverage']:.1f} %, and abstains below confidence 0.3" in told
    assert "made with abstain [0.3, 1.5], not None" in ivon_post.error(
        "generate", tiny_adapter, "-p", chats, *SMALL, "--tau", 0.5, "--prune-ratio", 0.3, "-a", "[a-z]",
        "-o", tmp_path / "out.jsonl", "-q",
    )  # fmt: skip


def test_an_interrupted_run_goes_on_and_ends_the_same(
    ivon_post: Cli, tiny_adapter: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    ivon_post("generate", tiny_adapter, "-p", chats, *SMALL, "-o", whole)
    append = nbest.NBestFile.append

    def fails_at_two(self: nbest.NBestFile, *more: Any) -> None:
        if self.done == 2:
            self._file.write(b'{"prompt": "half a li')
            raise IVONError("pulled the plug")
        append(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(nbest.NBestFile, "append", fails_at_two)
        assert "pulled" in ivon_post.run("generate", tiny_adapter, "-p", chats, *SMALL, "-o", path).stderr
    assert path.read_text().endswith("half a li")
    again = ["generate", tiny_adapter, "-p", chats, *SMALL, "-o", path]
    assert "4 prompts (2 were there), 4 outputs each from 2 draws, seed 0" in ivon_post(*again)
    assert path.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(local, "TransformersEngine", None)  # a complete file needs no model
    assert ivon_post.json(*again)["resumed"] == 4
    assert "made with seed 0, not 1" in ivon_post.error(*again, "--seed", 1, "--quiet")


def test_pruning_temperature_and_mean_reach_the_engine(
    ivon_post: Cli, tiny_adapter: Path, chats: Path, tmp_path: Path
) -> None:
    def texts(name: str, *options: object) -> list[list[str]]:
        ivon_post("generate", tiny_adapter, "-p", chats, *SMALL, "-o", tmp_path / name, *options)
        return [[output["text"] for output in line["outputs"]] for line in read(tmp_path / name)]

    mean = texts("mean", "--mean")
    cold = texts("cold", "--tau", "inf", "--per-model", 4)
    assert mean == cold
    recommended = tmp_path / "recommended.json"
    recommended.write_text('{"tau": 0.5, "ratio": 0.3}')
    pruned = texts("pruned", "--tau", 0.5, "--ratio", 0.3)
    assert pruned == texts("recommended", "--recommended", recommended)
    assert pruned not in (mean, texts("posterior"), texts("tempered", "--tau", 0.5))


def test_the_mean_of_an_adapter_without_sigma(
    ivon_post: Cli, make_adapter: Callable[..., Path], chats: Path, tmp_path: Path
) -> None:
    plain = make_adapter(sigma=False)
    assert "no ivon_sigma" in ivon_post.error("generate", plain, "-p", chats, "-q")
    ivon_post("generate", plain, "-p", chats, *SMALL, "--mean", "--limit", 2, "-o", tmp_path / "out.jsonl")
    lines = read(tmp_path / "out.jsonl")
    assert [[output["member"] for output in line["outputs"]] for line in lines] == [[0] * 4] * 2


def test_progress_tells_tokens_per_second(ivon_post: Cli, tiny_adapter: Path, chats: Path, tmp_path: Path) -> None:
    options = ["generate", tiny_adapter, "-p", chats, *SMALL, "--limit", 1, "-o"]
    loud = ivon_post.run(*options, tmp_path / "a")
    assert "tokens/s" in loud.stderr
    assert "tokens/s" not in loud.stdout
    assert ivon_post.run(*options, tmp_path / "b", "--quiet").stderr == ""
