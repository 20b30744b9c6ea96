"""`ivon-post card` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from command_line import Cli
from huggingface_hub import ModelCard
from tiny import write_chats


def test_what_eval_and_sweep_print_goes_into_the_card(
    tiny_adapter: Path, copied: Callable[..., Path], tmp_path: Path, ivon_post: Cli
) -> None:
    folder, data = copied(tiny_adapter), write_chats(tmp_path / "chats.jsonl", 20)
    common = [folder, "--data", data, "--samples", 2]
    (tmp_path / "eval.json").write_text(ivon_post("eval", *common, "--json"))
    measured = json.loads((tmp_path / "eval.json").read_text())["rows"]
    ivon_post("sweep", *common, "--tau", "1,inf", "--ratio", 0, "-o", tmp_path / "swept")
    call = ["card", folder, "--results", tmp_path / "eval.json", "--recommended", tmp_path / "swept/recommended.json"]
    printed = ivon_post(*call)
    names = ["README.md", *(f".eval_results/ivon-{row['name']}.yaml" for row in measured if row["name"] != "base")]
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
    (tmp_path / "eval.json").write_text('{"rows": [], "mean_sha256": "0", "adapter": "other"}')
    line = ivon_post.error("card", folder, "--results", tmp_path / "eval.json")
    assert "--results" in line
    assert "another adapter, other" in line
    line = ivon_post.error("card", tmp_path / "none", "--results", tmp_path / "eval.json")
    assert "no such folder here" in line
