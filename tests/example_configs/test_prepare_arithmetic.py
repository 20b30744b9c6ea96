"""The word problems that `example_configs/smollm2/arithmetic.yaml` trains on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "example_configs" / "smollm2"


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, str]]]:
    """Question and answer of every line, by set."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    from prepare_arithmetic import SIZES, write_sets

    write_sets(tmp_path, SIZES)
    found = {}
    for name, size in SIZES.items():
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == size
        found[name] = [{m["role"]: m["content"] for m in json.loads(line)["messages"]} for line in lines]
    return found


def test_every_step_is_right_and_the_last_is_the_answer(sets: dict[str, list[dict[str, str]]]) -> None:
    kinds = set()
    for problem in sets["train"] + sets["test"]:
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem["assistant"])
        assert len(steps) == 2
        for a, sign, b, result in steps:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result) > 0
        assert problem["assistant"].endswith(f". #### {steps[-1][-1]}")
        # Every number of the question is used, and nothing else but the first step's result.
        used = [number for a, _, b, _ in steps for number in (a, b)]
        used.remove(steps[0][-1])
        assert set(used) == set(re.findall(r"\d+", problem["user"]))
        kinds.add(tuple(sign for _, sign, _, _ in steps))
    assert kinds == {("+", "-"), ("*", "-"), ("*", "+"), ("+", "+")}


def test_no_question_occurs_twice(sets: dict[str, list[dict[str, str]]]) -> None:
    questions = [problem["user"] for own in sets.values() for problem in own]
    assert len(set(questions)) == len(questions)
