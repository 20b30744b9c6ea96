"""`ivon-post report` as a user calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from tiny import write_chats


def test_a_report_is_made_of_what_eval_and_sweep_wrote(
    tiny_adapter: Path, copied: Callable[..., Path], tmp_path: Path, ivon_post: Cli
) -> None:
    folder, data = copied(tiny_adapter), write_chats(tmp_path / "chats.jsonl", 20)
    common = [folder, "--data", data, "--samples", 2, "-q"]
    (tmp_path / "eval.json").write_text(ivon_post("eval", *common, "--json", "-o", tmp_path / "examples.jsonl"))
    ivon_post("sweep", *common, "--tau", "1,inf", "--ratio", 0, "-o", tmp_path / "swept")
    given = ["--eval", tmp_path / "eval.json", "--sweep", tmp_path / "swept" / "recommended.json", "-q"]
    assert ivon_post("report", folder, *given) == f"{tmp_path / 'adapter-report.html'}\n"
    cached = (tmp_path / "adapter-report.html").read_text()
    assert "posterior-pruned" in cached
    assert "Temperature and pruning" in cached
    assert "--overwrite" in ivon_post.error("report", folder, *given)
    output = tmp_path / "again.html"
    made = ivon_post.json("report", folder, "-d", data, "-q", "-o", output, "--sweep", given[3])
    assert made == {"output": str(output)}
    # The same evaluation, so the same pictures of it.
    assert "reliability of posterior" in output.read_text()
    assert "Surest" in output.read_text()
    former = ["--results", given[1], "--recommended", given[3]]
    assert ivon_post("report", folder, "-q", "--overwrite", *former)
    assert (tmp_path / "adapter-report.html").read_text() == cached
    ivon_post("report", folder, "-q", "--overwrite")
    assert "Nothing was evaluated" in (tmp_path / "adapter-report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval", "eval.json", "--data", "x"], "leave --data out"),
        (["--eval", "none.json"], "--eval cannot be read"),
        (["--examples", "x.jsonl"], "--examples x.jsonl: give the --eval that belongs to it too"),
        (["-o", "no/where.html"], "--output no/where.html: there is no such folder"),
        (["--data", "none.jsonl"], "--data none.jsonl: cannot be read"),
    ],
)
def test_bad_input_writes_nothing(
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ivon_post: Cli,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ivon_post.error("report", tiny_adapter, "-q", *(["-o", "r.html"] if "-o" not in options else []), *options)
    assert message in line
    assert not list(tmp_path.iterdir())
