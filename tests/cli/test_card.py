"""`ivon-post card` as a user calls it."""

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


def test_results_of_another_adapter_are_refused(
    tiny_adapter: Path, copied: Callable[..., Path], tmp_path: Path, ivon_post: Cli
) -> None:
    folder = copied(tiny_adapter)
    (tmp_path / "eval.json").write_text(
        '{"rows": [{"name": "mean", "data": "x", "examples": 1}], "mean_sha256": "0", "adapter": "other"}'
    )
    line = ivon_post.error("card", folder, "--results", tmp_path / "eval.json")
    assert "--results" in line
    assert "another adapter, other" in line
    line = ivon_post.error("card", tmp_path / "none", "--results", tmp_path / "eval.json")
    assert "no such folder here" in line
