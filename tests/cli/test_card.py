"""`ivon-post card` as a user calls it; `test_refusals.py` has what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from command_line import Cli
from huggingface_hub import ModelCard
from pipeline import Pipeline


def test_what_eval_and_sweep_print_goes_into_the_card(
    pipeline: Pipeline, copied: Callable[..., Path], ivon_post: Cli
) -> None:
    folder, measured = copied(pipeline.adapter), pipeline.read("evaluation")["rows"]
    call = ["card", folder, "--results", pipeline.evaluation, "--recommended", pipeline.recommended]
    printed = ivon_post(*call)
    variants = [row["name"].replace("+", "-") for row in measured if row["name"] != "base"]
    names = ["README.md", *(f".eval_results/ivon-{name}.yaml" for name in variants)]
    assert printed.split() == [str(folder / name) for name in names]
    card = ModelCard.load(folder / "README.md")
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found["nll, mean (ivon-post eval)"] == next(row["nll"] for row in measured if row["name"] == "mean")
    assert "by nll on chats.jsonl" in card.text
    before = (folder / "README.md").read_bytes()
    assert ivon_post.json(*call) == {"files": printed.split()}
    assert (folder / "README.md").read_bytes() == before
