"""benchmarks/testtime: figures over outputs against brute force, the sets of problems, and a run on a tiny Llama."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from axolotl_ivon.generation.nbest import NBest
from benchmarks import testtime
from benchmarks.testtime import Problem, draws_differ, figures, is_sure, part, split_templates, telling


def nbest(answers: list[int | None], members: list[int], reference: int = 0, name: str = "a") -> NBest:
    texts = tuple("?" if answer is None else f"#### {answer}" for answer in answers)
    return NBest(name, f"#### {reference}", texts, tuple(members), tuple(-float(i) for i in range(len(texts))), "f:1")


@pytest.mark.parametrize(
    ("members", "per_draw", "n", "expected"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, 4, [0, 1, 2, 3]),  # two draws, whole
        ([0, 0, 1, 1, 2, 2, 3, 3], None, 4, [0, 2, 4, 6]),  # an output of each of four runs
        ([0] * 8, None, 4, [0, 1, 2, 3]),
        ([0, 0, 1, 1], 2, 4, [0, 1, 2, 3]),
    ],
)
def test_a_smaller_n_has_as_many_outputs_of_every_member(
    members: list[int], per_draw: int | None, n: int, expected: list[int]
) -> None:
    whole = nbest(list(range(len(members))), members)
    some = part(whole, n, per_draw)
    assert some.texts == tuple(whole.texts[i] for i in expected)
    assert some.members == tuple(members[i] for i in expected)
    assert some.logprobs == tuple(whole.logprobs[i] for i in expected)
    assert len({some.members.count(member) for member in some.members}) == 1


def test_a_vote_is_sure_if_its_lead_is_above_two_standard_errors() -> None:
    assert [first for first in range(1, 12) if is_sure(["1"] * first)] == list(range(5, 12))  # n > 2·√n
    for first, second in itertools.product(range(12), range(12)):
        votes = ["1"] * first + ["2"] * second + [None] * 30
        assert is_sure(votes) == (abs(first - second) > 2 * math.sqrt(first + second))


def test_figures_are_those_of_brute_force() -> None:
    rng = random.Random(0)
    members = [0, 0, 1, 1, 2, 2]
    nbests = [
        nbest([rng.choice([0, 0, 1, 2, None]) for _ in members], members, reference=rng.choice([0, 1]), name=str(i))
        for i in range(30)
    ]
    found = figures(nbests)
    correct = [[text == one.reference for text in one.texts] for one in nbests]
    assert found["single"] == pytest.approx(np.mean(correct))
    assert found["pass"] == pytest.approx(sum(map(any, correct)) / 30)
    right = []
    for one in nbests:
        votes = {t: sum(t == other for other in one.texts) * (t != "?") for t in one.texts}
        winner = next(t for t in one.texts if votes[t] == max(votes.values()))  # the earliest is the most probable
        right.append(winner == one.reference and winner != "?")
    assert found["right"] == "".join(str(int(value)) for value in right)
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["telling"].keys() == {*testtime.MEASURES, "disagreement"}
    one_model = figures([replace(one, members=(0,) * 6) for one in nbests])
    assert one_model["differ"] is None
    assert "mutual_information" not in one_model["telling"]  # it is 0 of one model
    assert one_model["right"] == found["right"]


def test_draws_differ_if_their_votes_do() -> None:
    assert not draws_differ(["1", "1", "2", "1", "1", "3"], [0, 0, 0, 1, 1, 1])
    assert draws_differ(["1", "1", "2", "2", "2", "1"], [0, 0, 0, 1, 1, 1])


def test_wrong_answers_are_told_as_by_counting_and_sorting() -> None:
    rng = np.random.default_rng(1)
    unsure, wrong = rng.permutation(50) / 50, rng.integers(0, 2, 50)
    found = telling(unsure, wrong)
    pairs = [(a, b) for a in unsure[wrong == 1] for b in unsure[wrong == 0]]
    order = np.argsort(unsure)
    risks = [wrong[order[:count]].mean() for count in range(1, 51)]
    assert found["auroc"] == pytest.approx(np.mean([a > b for a, b in pairs]), abs=1e-4)
    assert found["aurc"] == pytest.approx(np.trapezoid(risks, dx=1 / 49), abs=1e-4)
    assert found["answered"] == pytest.approx(1 - risks[39], abs=1e-4)
    resampled = [wrong[order[rng.integers(0, 40, 40)]].mean() for _ in range(2000)]
    assert found["answered_se"] == pytest.approx(np.std(resampled), rel=0.5)
    assert telling(unsure, np.zeros(50, int))["auroc"] is None


def test_the_working_goes_step_by_step_to_the_answer() -> None:
    assert testtime.working("4 - 1 - 7") == ["4 - 1 = 3", "3 - 7 = -4"]
    assert testtime.working("12 + 30 - 45 + 9") == ["12 + 30 = 42", "42 - 45 = -3", "-3 + 9 = 6"]


def test_no_template_is_in_two_sets_where_there_are_enough() -> None:
    sets = split_templates(range(85))
    assert sorted(number for own in sets.values() for number in own) == list(range(85))
    assert [len(sets[split]) for split in testtime.SPLITS] == [51, 13, 21]
    assert split_templates([0]) == {"train": [0], "validation": [0], "test": [0]}


def numbers(seed: int, templates: list[int]) -> Any:
    """Problems that the tiny tokenizer below can read."""
    rng = random.Random(seed)
    while True:
        number = rng.randrange(10**6)
        yield Problem(f"{number:06}", f"#### {number % 10}", 0)


class Digits:
    """A tokenizer of characters."""

    eos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"#### {token % 3} " for token in ids)


@pytest.mark.parametrize("method", ["AdamW, 4 runs", "auto, draws, pruned by SNR, τ chosen", "paper, mean"])
def test_a_run_gives_a_record_goes_on_and_is_reported(
    method: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = testtime.Suite(
        str(tiny_llama),
        "numbers",
        ["auto, mean", method],
        seeds=(0,),
        sizes=(8, 3, 4),
        steps=2,
        batch=4,
        rank=2,
        lrs=(1e-3, 1e-2),
        counts=(4, 8),
        per_model=2,
        taus=(1.0, 4.0),
        temperatures=(0.7, 1.0),
        tuning=4,
        max_tokens=3,
        utilities=(),
    )
    monkeypatch.setitem(testtime.SUITES, "tiny", suite)
    monkeypatch.setitem(testtime.GENERATORS, "numbers", numbers)
    monkeypatch.setattr(testtime, "templates_of", lambda task: [0])
    monkeypatch.setattr(testtime, "prepare", lambda *_: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: Digits())
    arguments = SimpleNamespace(
        quick=False,
        suites=["tiny"],
        threads=1,
        work=tmp_path / "work",
        results=tmp_path / "r.jsonl",
        until=None,
        methods=None,
        seeds=None,
    )
    testtime.run(arguments)
    records = testtime.read_results(arguments.results)
    assert [(r["method"], [*r["by_n"]], len(r["by_n"]["8"]["right"])) for r in records] == [
        ("auto, mean", ["4", "8"], 4),
        (method, ["4", "8"], 4),
    ]
    assert records[0]["templates"] == {"train": 1, "validation": 1, "test": 1, "shared": 1}
    # A run that lost its last line makes the same of the outputs that it has written, and nothing is trained again.
    arguments.results.unlink()
    testtime.append(arguments.results, records[0])
    monkeypatch.setitem(testtime.TRAINERS, "adamw", None)
    testtime.run(arguments)
    again = testtime.read_results(arguments.results)[1]
    assert again["by_n"] == records[1]["by_n"]
    page = (
        "<!-- table: tiny accuracy -->\nold\n<!-- end of table -->\n<!-- table: tiny telling -->\n<!-- end of table -->"
    )
    filled = testtime.fill(page, records)
    assert "old" not in filled
    assert filled.count(f"| {method} |") >= 1
    testtime.draw(records, "tiny", tmp_path)
    assert (tmp_path / "testtime-tiny-methods.png").stat().st_size > 1000
