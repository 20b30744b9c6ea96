"""`ivon-post report` and `card` as a user calls them; `test_refusals.py` has what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from command_line import Cli
from huggingface_hub import ModelCard
from pipeline import Pipeline


def test_eval_and_sweep_report(pipeline: Pipeline, copied: Callable[..., Path], tmp_path: Path, ivon_post: Cli) -> None:
    folder, page = copied(pipeline.adapter), tmp_path / "adapter-report.html"
    given = ["--eval", pipeline.evaluation, "--sweep", pipeline.recommended, "-q"]
    assert ivon_post("report", folder, *given) == f"{page}\n"
    cached = page.read_text()
    assert "posterior-pruned" in cached
    assert "Temperature and pruning" in cached
    assert "--overwrite" in ivon_post.error("report", folder, *given)
    former = ["--results", given[1], "--recommended", given[3], "-q", "--overwrite"]
    assert ivon_post.json("report", folder, *former) == {"output": str(page)}
    assert page.read_text() == cached
    ivon_post("report", folder, "-q", "--overwrite")
    assert "Nothing was evaluated" in page.read_text()


def test_eval_and_sweep_go_into_the_card(pipeline: Pipeline, copied: Callable[..., Path], ivon_post: Cli) -> None:
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
