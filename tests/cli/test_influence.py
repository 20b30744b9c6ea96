"""`ivon-post influence` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from tiny import chat, write_chats

KEYS = ["index", "loss", "leverage", "sensitivity", "on", "line", "question", "answer", "mean_sha256"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "train.jsonl", count=25)


def test_scores_then_clean_data_then_a_report(
    tiny_adapter: Path, make_adapter: Callable[..., Path], data: Path, tmp_path: Path, ivon_post: Cli
) -> None:
    out, clean, validation = tmp_path / "influence.jsonl", tmp_path / "clean.jsonl", tmp_path / "validation.jsonl"
    write_chats(validation, count=6, seed=1)
    result = ivon_post.done("influence", tiny_adapter, "-d", data, "--on", validation, "-o", out)
    assert result.stdout.splitlines() == ["no row stands out by sensitivity, of 25: nothing to leave out", str(out)]
    assert "--keep" not in result.stderr, "clean data stay whole"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 25
    texts = data.read_text().splitlines(keepends=True)
    for by, key in (("sensitivity", lambda i: -rows[i]["sensitivity"]), ("on", lambda i: rows[i]["on"])):
        words = ["--scores", out, "--by", by, "--keep", 0.9, "-o", clean, "--overwrite"]
        said = ivon_post("influence", tiny_adapter, "-d", data, *words)
        gone = sorted(range(25), key=key)[:3]  # 22.5 of 25 are 22
        assert clean.read_text() == "".join(text for i, text in enumerate(texts) if i not in gone)
        assert said.splitlines() == [f"22 rows stay, 3 are left out, by {by}", str(clean)]
    ivon_post("report", tiny_adapter, "--influence", out, "-o", tmp_path / "report.html")
    assert "Which training rows stand out?" in (tmp_path / "report.html").read_text()
    other = make_adapter(seed=3)
    for word, name in (("influence", "scores"), ("report", "influence")):
        words = [
            word,
            other,
            f"--{name}",
            out,
            "-o",
            tmp_path / "new",
            *(["-d", data, "--keep", 0.9] * (name == "scores")),
        ]
        assert f"--{name} {out} is of another adapter (mean_sha256 differs)" in ivon_post.error(*words)


def test_rows_that_stand_out_are_shown_and_proposed(
    tiny_adapter: Path, data: Path, tmp_path: Path, ivon_post: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers that the model has never seen among 25 that it knows."""
    lines = data.read_text().splitlines()
    for i in (3, 11, 20):
        lines[i] = json.dumps(chat(f"question {i}", "three cold moons"))
    data.write_text("\n".join(lines))
    out = tmp_path / "influence.jsonl"
    ivon_post("influence", tiny_adapter, "-d", data, "-o", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["sensitivity"] = (5.0 if i in (3, 11, 20) else 0.1) + i / 1000
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["influence", tiny_adapter, "-d", data, "--scores", out, "--keep", 0.88, "-o", tmp_path / "clean"]
    title, head, *lines, stay, _ = ivon_post(*words).splitlines()
    assert title.strip() == "3 of 25 rows stand out by sensitivity"
    assert head.split() == ["line", "answer", "←", "question", "loss", "leverage", "sensitivity"]
    assert [line.split()[0] for line in lines] == ["21", "12", "4"]
    assert all("three cold moons ← question" in line for line in lines)
    assert stay == "22 rows stay, 3 are left out, by sensitivity"
    monkeypatch.setattr("axolotl_ivon.influence.ranking.standing_out", lambda rows, by: [20, 11, 3])
    result = ivon_post.run("influence", tiny_adapter, "-d", data, "-o", out, "--overwrite")
    again = f"--scores {out} --by sensitivity --keep 0.88 -o clean.jsonl"
    assert result.stderr.splitlines()[-1] == f"next: ivon-post influence {tiny_adapter} --data {data} {again}"


def test_all_at_once_and_for_machines(tiny_adapter: Path, data: Path, tmp_path: Path, ivon_post: Cli) -> None:
    clean = tmp_path / "clean.jsonl"
    document = ivon_post.json("influence", tiny_adapter, "--data", data, "--keep", 0.8, "-o", clean)
    assert len(clean.read_text().splitlines()) == 20
    rows = document["rows"]
    assert [list(row) for row in rows] == [KEYS] * 25
    assert {row["on"] for row in rows} == {None}
    assert document["left_out"] == document["most_suspicious"][:5]
    assert (document["ess"], document["train_size"], document["tau"]) == (1000.0, 100, 1.0)
    assert (document["by"], document["keep"], document["output"]) == ("sensitivity", 0.8, str(clean))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.jsonl", "train.jsonl"]
    few = ivon_post.json("influence", tiny_adapter, "--data", data, "--limit", 2)
    assert len(few["rows"]) == 2
    assert few["left_out"] == []
