"""`ivon-post report` as a user calls it; `test_refusals.py` has what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from command_line import Cli
from pipeline import Pipeline


def test_a_report_is_made_of_what_eval_and_sweep_wrote(
    pipeline: Pipeline, copied: Callable[..., Path], tmp_path: Path, ivon_post: Cli
) -> None:
    folder, page = copied(pipeline.adapter), tmp_path / "adapter-report.html"
    given = ["--eval", pipeline.evaluation, "--sweep", pipeline.recommended, "-q"]
    assert ivon_post("report", folder, *given) == f"{page}\n"
    cached = page.read_text()
    assert "posterior-pruned" in cached
    assert "Temperature and pruning" in cached
    assert "--overwrite" in ivon_post.error("report", folder, *given)
    output = tmp_path / "again.html"
    made = ivon_post.json("report", folder, "-d", pipeline.chats, *given[2:], "-o", output)
    assert made == {"output": str(output)}
    # The same evaluation, so the same pictures of it.
    assert "reliability of posterior" in output.read_text()
    assert "Surest" in output.read_text()
    former = ["--results", given[1], "--recommended", given[3]]
    assert ivon_post("report", folder, "-q", "--overwrite", *former)
    assert page.read_text() == cached
    ivon_post("report", folder, "-q", "--overwrite")
    assert "Nothing was evaluated" in page.read_text()
