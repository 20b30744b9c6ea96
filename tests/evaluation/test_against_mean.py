"""The paired difference is the difference of what `evaluate` reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_chats

from axolotl_ivon.evaluation.against_mean import draws_against_mean
from axolotl_ivon.evaluation.evaluate import Evaluation, choose_rows, summarize


@pytest.mark.parametrize("task", ["choice", "generate"])
def test_the_difference_is_that_of_the_table(task: str, tiny_adapter: Path, tmp_path: Path) -> None:
    data = [write_chats(tmp_path / f"{seed}.jsonl", 9, seed) for seed in (1, 2)]
    found = draws_against_mean(tiny_adapter, data, samples=3, task=task, limit=8)
    rows = choose_rows(["mean", "posterior"])
    evaluation = Evaluation(tiny_adapter, data, rows=rows, task=task, limit=8)
    table = summarize(evaluation, rows, evaluation.run(rows, samples=3), 3)
    for path, row in zip(data, found, strict=True):
        mean, draws = (line["nll"] for line in table if line["data"] == str(path))
        # Answers are equally long, so the mean over examples is that over tokens.
        assert row["difference"] == pytest.approx(draws - mean, rel=1e-6)
        assert (row["data"], row["examples"]) == (str(path), 8)
        assert row["se"] > 0
