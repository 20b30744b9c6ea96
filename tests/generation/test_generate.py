"""A file of n-best lists: its plan and source, what a line holds, what an interrupt leaves, and its reading."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from heard import Heard
from pipeline import Pipeline

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import read_chats
from axolotl_ivon.data.encode import Prompt
from axolotl_ivon.generation.generate import Generated, generate, loaded_draws, speed_text
from axolotl_ivon.generation.nbest import NBestFile, read_nbest
from axolotl_ivon.generation.plan import Output, Plan

PLAN = Plan(n=4, per_model=2, max_tokens=5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 12}, "n 12 is not a multiple of per_model 8; say n 8"),
        ({"n": 3}, "say n 8"),
        ({"n": 0}, "n 0"),
        ({"per_model": 0}, "per_model 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"stop": ("x", "")}, "stop ''"),
    ],
)
def test_a_wrong_plan_is_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(IVONError, match=message) as error:
        Plan(**wrong)
    assert error.value.parameter in wrong
    assert Plan(n=12, mean=True).per_member == 12, "the mean needs no multiple"


def test_a_file_is_filled_and_then_left(tiny_adapter: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    chats, path, heard = read_chats(pipeline.chats, 3), tmp_path / "out.jsonl", Heard()
    source = loaded_draws(str(tiny_adapter), PLAN)
    first = generate(source, chats, path, reporter=heard)
    assert (first.prompts, first.resumed) == (3, 0)
    assert first.tokens > 0
    assert first.tokens_per_second == pytest.approx(first.tokens / first.seconds)
    assert list(heard.counts) == ["loading the tokenizer", "loading the base model", "generating"]
    assert heard.counts["generating"] == [(0, 3), (1, 3), (1, 3), (1, 3)]
    heard = Heard()
    assert generate(source, chats, path, reporter=heard) == Generated(3, 3)
    assert Generated(3, 3).tokens_per_second == 0
    assert list(heard.counts) == ["loading the tokenizer"], "a file that lacks nothing needs no model"


def test_copies_of_a_greedy_output_are_tokens_once(tiny_adapter: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    outputs = [Output("x", 0, -1.0, 3)] * 2 + [Output("y", 1, -1.0, 5)] * 2
    engine = SimpleNamespace(outputs=lambda prompts, start: [outputs])
    for temperature, tokens in ((1, 16), (0, 8)):
        source = loaded_draws(str(tiny_adapter), replace(PLAN, temperature=temperature))
        source = replace(source, start=lambda reporter: engine)
        path = tmp_path / f"{temperature}.jsonl"
        assert generate(source, read_chats(pipeline.chats, 1), path).tokens == tokens


def test_the_posterior_that_is_drawn_from(tiny_adapter: Path, make_adapter: Callable[..., Path]) -> None:
    expected = Posterior.from_pretrained(tiny_adapter).prune(0.3).temper(2.0)
    settings = loaded_draws(str(tiny_adapter), PLAN, 2.0, 0.3).settings
    assert (settings["tau"], settings["prune_ratio"]) == (2.0, 0.3)
    assert settings["adapter"] == expected.metadata["mean_sha256"]
    other = make_adapter()
    Posterior.from_pretrained(tiny_adapter).temper(4.0).save_pretrained(other, overwrite=True)
    drawn = [loaded_draws(str(folder), PLAN).settings for folder in (tiny_adapter, other)]
    assert drawn[0]["adapter"] == drawn[1]["adapter"]  # one mean
    assert drawn[0]["sigma"] != drawn[1]["sigma"]
    assert "sigma" not in loaded_draws(str(other), Plan(n=4, mean=True)).settings
    plain = str(make_adapter(sigma=False))
    assert loaded_draws(plain, Plan(n=4, mean=True)).settings["tau"] == "inf"
    for plan, ratio in ((PLAN, 0.0), (Plan(n=4, mean=True), 0.1)):
        with pytest.raises(IVONError, match=r"has no ivon_sigma\.safetensors"):
            loaded_draws(plain, plan, math.inf, ratio)


PROMPTS = [Prompt(f"question {i}\n", [i], None if i else "yes", f"p:{i}") for i in range(4)]
OUTPUTS = [[Output(f"text\n\r\u2028 {i}", 0, -1.5, 3), Output("\ud800", 1, None, 1)] for i in range(4)]
SETTINGS = {"seed": 0, "stop": ("x",)}


def fill(path: Path, upto: int, settings: dict[str, Any] | None = None, **options: Any) -> NBestFile:
    file = NBestFile(path, settings or SETTINGS, **options)
    for index in range(file.resume(PROMPTS), upto):
        file.append(PROMPTS[index], OUTPUTS[index])
    file.close()
    return file


def test_a_line_holds_what_is_promised_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 4)
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 5
    assert json.loads(lines[0]) == {
        "prompt": "question 0\n",
        "reference": "yes",
        "outputs": [
            {"text": "text\n\r\u2028 0", "member": 0, "logprob": -1.5},
            {"text": "\ud800", "member": 1, "logprob": None},
        ],
    }
    nbests = read_nbest(path)
    assert [nbest.reference for nbest in nbests] == ["yes", None, None, None]
    assert nbests[0].texts == ("text\n\r\u2028 0", "\ud800")
    assert (nbests[0].members, nbests[0].logprobs) == ((0, 1), (-1.5, -np.inf))


@pytest.mark.parametrize("cut", [0, 1, 7, 40])
def test_an_interrupted_file_goes_on_and_ends_the_same(tmp_path: Path, cut: int) -> None:
    fill(tmp_path / "whole.jsonl", 4)
    path = tmp_path / "out.jsonl"
    fill(path, 2)
    content = path.read_bytes()[: -cut or None]
    path.write_bytes(content)
    assert NBestFile(path, SETTINGS).resume(PROMPTS) == (1 if cut else 2)
    assert path.read_bytes() == content  # nothing is changed by looking
    assert fill(path, 4).done == 4
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_settings_prompts_or_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 3)
    content = path.read_bytes()
    with pytest.raises(IVONError, match=r"made with seed 0, not 1; choose another output, or .* with overwrite"):
        fill(path, 4, {**SETTINGS, "seed": 1})
    for prompts in (PROMPTS[:2], PROMPTS[1:]):
        with pytest.raises(IVONError, match="answers another prompt"):
            NBestFile(path, SETTINGS).resume(prompts)
    with pytest.raises(IVONError, match=r"out.jsonl:1 has another reference than prompts has there; choose another"):
        NBestFile(path, SETTINGS).resume([PROMPTS[0]._replace(reference="no"), *PROMPTS[1:]])
    assert path.read_bytes() == content
    path.write_bytes(content + b"junk\n")
    with pytest.raises(IVONError, match=r"out.jsonl:4: not an n-best list"):
        fill(path, 4)
    with pytest.raises(IVONError, match="give a file in a folder that exists"):
        fill(tmp_path, 4)
    fill(path, 1, {"seed": 1}, overwrite=True)
    assert len(path.read_bytes().splitlines()) == 1
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text()) == {"seed": 1}


def test_what_is_judged_of_outputs_stands_in_the_line_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 1)
    file, again = NBestFile(path, SETTINGS), NBestFile(path, SETTINGS)
    file.resume(PROMPTS)
    for abstain in (True, False, True):
        file.append(PROMPTS[file.done], OUTPUTS[0], {"confidence": 0.5, "abstain": abstain})
    file.close()
    assert again.resume(PROMPTS) == 4
    assert file.abstained == again.abstained == 2
    lines = list(map(json.loads, path.read_bytes().splitlines()))
    assert [line.get("abstain") for line in lines] == [None, True, False, True]
    assert list(lines[1]) == ["prompt", "reference", "confidence", "abstain", "outputs"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"outputs": [{"text": "a"}], "reference": 1}', "f.jsonl:1: reference is 1"),
        ('{"outputs": [{"text": "a", "logprob": NaN}]}', "f.jsonl:1: outputs[0].logprob is nan"),
        ('{"outputs": [{"text": "a"}]}\n{"outputs": [{"text": "a"}, {"text": "b"}]}', "f.jsonl:2: 2 outputs, but 1"),
        ("", "the file is empty"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(line)
    with pytest.raises(IVONError, match=re.escape(message)):
        read_nbest(tmp_path / "f.jsonl")


def test_a_slow_speed_is_not_written_as_none() -> None:
    assert [speed_text(speed) for speed in (0.2, 1.4, 123.6)] == ["<1 tokens/s", "1 tokens/s", "124 tokens/s"]
