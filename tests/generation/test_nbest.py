"""n-best lists on the disk: what a line holds, what an interrupt leaves, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.data.encode import Prompt
from axolotl_ivon.generation.nbest import NBestFile, read_nbest, read_source
from axolotl_ivon.generation.plan import Output

PROMPTS = [Prompt(f"question {i}\n", [i], None if i else "yes", f"p:{i}") for i in range(4)]
OUTPUTS = [[Output(f"text\n\r\u2028 {i}", 0, -1.5, 3), Output("\ud800", 1, None, 1)] for i in range(4)]


def fill(path: Path, upto: int, settings: dict[str, Any] | None = None, **options: Any) -> NBestFile:
    file = NBestFile(path, settings or {"seed": 0, "stop": ("x",)}, PROMPTS, **options)
    for index in range(file.done, upto):
        file.append(PROMPTS[index], OUTPUTS[index])
    file.close()
    return file


def test_a_line_holds_what_is_promised(tmp_path: Path) -> None:
    fill(tmp_path / "out.jsonl", 4)
    lines = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 5
    assert json.loads(lines[0]) == {
        "prompt": "question 0\n",
        "reference": "yes",
        "outputs": [
            {"text": "text\n\r\u2028 0", "member": 0, "logprob": -1.5},
            {"text": "\ud800", "member": 1, "logprob": None},
        ],
    }


@pytest.mark.parametrize("cut", [0, 1, 7, 40])
def test_an_interrupted_file_goes_on_and_ends_the_same(tmp_path: Path, cut: int) -> None:
    fill(tmp_path / "whole.jsonl", 4)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    fill(tmp_path / "out.jsonl", 2)
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(content[: len(content) - cut])
    assert NBestFile(tmp_path / "out.jsonl", {"seed": 0, "stop": ["x"]}, PROMPTS).done == (1 if cut else 2)
    assert (tmp_path / "out.jsonl").read_bytes() == content[: len(content) - cut]  # nothing is changed by looking
    assert fill(tmp_path / "out.jsonl", 4).done == 4
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_other_settings_prompts_or_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 3)
    content = path.read_bytes()
    with pytest.raises(IVONError, match=r"made with seed 0, not 1; choose another output, or .* with overwrite"):
        fill(path, 4, {"seed": 1, "stop": ("x",)})
    for prompts in (PROMPTS[:2], PROMPTS[1:]):
        with pytest.raises(IVONError, match="answers another prompt"):
            NBestFile(path, {"seed": 0, "stop": ("x",)}, prompts)
    assert path.read_bytes() == content
    path.write_bytes(content + b"junk\n")
    with pytest.raises(IVONError, match=r"out.jsonl:4: not an n-best list"):
        fill(path, 4)
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(IVONError, match="was not made by"):
        fill(tmp_path / "other.jsonl", 4)
    for nowhere in (tmp_path, tmp_path / "no" / "out.jsonl"):
        with pytest.raises(IVONError, match="not a file in an existing folder"):
            fill(nowhere, 4)


def test_what_is_known_of_outputs_stands_in_the_line_and_is_counted(tmp_path: Path) -> None:
    fill(tmp_path / "out.jsonl", 1)
    file = NBestFile(tmp_path / "out.jsonl", {"seed": 0, "stop": ["x"]}, PROMPTS)
    for abstain in (True, False, True):
        file.append(PROMPTS[file.done], OUTPUTS[0], {"confidence": 0.5, "abstain": abstain})
    file.close()
    assert file.abstained == 2
    assert NBestFile(tmp_path / "out.jsonl", {"seed": 0, "stop": ["x"]}, PROMPTS).abstained == 2
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n") if line]
    assert [line.get("abstain") for line in lines] == [None, True, False, True]
    assert list(lines[1]) == ["prompt", "reference", "confidence", "abstain", "outputs"]


def test_what_outputs_were_drawn_from_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert read_source(path) is None
    for settings, expected in (
        ({"tau": "inf", "prune_ratio": 0.1, "adapter": "abc"}, {"tau": "inf", "ratio": 0.1, "mean_sha256": "abc"}),
        ({"ensemble": {"tau": 2.0, "pruned_ratio": 0.3}}, {"tau": 2.0, "ratio": 0.3, "mean_sha256": None}),
    ):
        fill(path, 1, settings, overwrite=True)
        assert read_source(path) == expected


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    fill(tmp_path / "out.jsonl", 3)
    file = fill(tmp_path / "out.jsonl", 1, {"seed": 1}, overwrite=True)
    assert file.done == 1
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 1
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text()) == {"seed": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f.jsonl:1: not JSON"),
        ("{}", "f.jsonl:1: no list of outputs"),
        ('{"outputs": []}', "f.jsonl:1: no list of outputs"),
        ('{"outputs": [{"text": "a"}], "reference": 1}', "f.jsonl:1: no list of outputs"),
        ('{"outputs": ["a"]}', "f.jsonl:1: an output has no text"),
        ('{"outputs": [{"text": "a", "logprob": NaN}]}', "f.jsonl:1: an output has no text, or a member or logprob"),
        ('{"outputs": [{"text": "a", "member": "x"}]}', "f.jsonl:1: an output has no text, or a member"),
        ('{"outputs": [{"text": "a"}]}\n{"outputs": [{"text": "a"}, {"text": "b"}]}', "f.jsonl:2: 2 outputs, but 1"),
        ("", "the file is empty"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(line)
    with pytest.raises(IVONError) as error:
        read_nbest(tmp_path / "f.jsonl")
    assert message in str(error.value)


def test_outputs_without_facts_are_read(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps({"outputs": [{"text": "a"}, {"text": "b", "logprob": None}]}))
    [found] = read_nbest(tmp_path / "f.jsonl")
    assert (found.members, found.logprobs, found.reference) == ((0, 0), (-np.inf, -np.inf), None)
