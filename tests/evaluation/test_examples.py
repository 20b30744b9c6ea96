"""What is written of every example, against the scores it comes from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from evaluations import ROWS
from tiny import write_chats

from axolotl_ivon.data.chats import read_examples
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.run import describe
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.metrics.scores import Scores
from axolotl_ivon.records.base import save_lines


def test_every_line_says_what_the_scores_say(
    evaluation: Evaluation, scores: list[Scores], chats: Path, tmp_path: Path
) -> None:
    save_lines(tmp_path / "out.jsonl", describe(evaluation, ROWS, scores))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    examples = read_examples(chats)
    assert [(line["data"], line["line"]) for line in lines] == [(str(chats), n) for n in range(1, 25)]
    for number, (line, example, item) in enumerate(zip(lines, examples, evaluation.items, strict=True)):
        assert (line["question"], line["answer"]) == (example.messages[-1]["content"], example.answer)
        assert list(line["rows"]) == [row.name for row in ROWS]
        for score, found in zip(scores, line["rows"].values(), strict=True):
            own = score.group == number
            for name, values in (
                ("confidence", score.confidence),
                ("nll", score.nll),
                ("entropy", score.entropy),
                ("mutual_information", score.entropy - score.expected_entropy),
            ):
                assert found[name] == pytest.approx(values[own].mean().item(), abs=1e-12)
            share = score.correct[own].mean().item()
            if evaluation.task == "generate":
                assert (found["tokens"], found["accuracy"]) == (len(item.targets), pytest.approx(share))
                continue
            assert sum(found["probabilities"].values()) == pytest.approx(1)
            assert found["probabilities"][found["prediction"]] == found["confidence"]
            assert found["right"] == (found["prediction"] == example.answer) == bool(share)


def test_other_data_is_described_too_and_what_is_unknown_is_null(adapter: Path, chats: Path, tmp_path: Path) -> None:
    other = write_chats(tmp_path / "other.jsonl", 5, seed=4)
    evaluation = Evaluation(adapter, EvaluationData([chats], ood=[other]))
    rows = [Variant("posterior+temperature", tau=0.5, temperature=2.0)]
    lines = list(describe(evaluation, rows, evaluation.run(rows, Sampling(samples=2))))
    assert Counter(line.data for line in lines) == {str(chats): 24, str(other): 5}
    assert all(line.rows["posterior+temperature"].mutual_information is None for line in lines)


def test_a_failure_leaves_the_old_file(evaluation: Evaluation, scores: list[Scores], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        save_lines(path, describe(evaluation, ROWS[:-1], scores))
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
