"""`ivon-post predict` as a user calls it, against `axolotl_ivon.predict`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from tiny import chat, write_chats

from axolotl_ivon import predict
from axolotl_ivon.records.decision import Decision

LABELS = ["yes no", "A", "yes"]
TEXTS = ["red sun", "moon", "rain dog", "  warm cold "] * 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of every kind; what is asked is TEXTS."""
    kinds = [
        lambda text: {"text": text, "label": 1},
        lambda text: chat(text, "an answer is ignored"),
        lambda text: {"messages": [{"role": "user", "content": text}]},
        lambda text: {"instruction": text},
    ]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps(kinds[n % 4](text)) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def decisions(tiny_adapter: Path) -> list[Decision]:
    return predict(tiny_adapter, TEXTS, LABELS, n=2, threshold=0.4)


def words(adapter: Path, *more: object) -> list[str]:
    return [str(word) for word in ("predict", adapter, "--choices", ", ".join(LABELS), "-n", 2, *more)]


def check(lines: list[dict[str, Any]], decisions: list[Decision]) -> None:
    assert [(line.pop("line"), line.pop("text")) for line in lines] == list(enumerate(TEXTS, start=1))
    for line, decision in zip(lines, decisions, strict=True):
        probabilities = line.pop("probabilities")
        assert probabilities == pytest.approx(decision.probabilities, rel=1e-4)
        assert (line.pop("label"), line.pop("abstain")) == (decision.label, decision.abstain)
        assert line == pytest.approx({name: getattr(decision, name) for name in line}, rel=1e-2, abs=1e-6)


def test_lines_are_the_decisions_of_the_library_and_go_on_after_an_interrupt(
    tiny_adapter: Path, data: Path, decisions: list[Decision], tmp_path: Path, ivon_post: Cli
) -> None:
    path = tmp_path / "out.jsonl"
    given = words(tiny_adapter, "--data", data, "--threshold", 0.4, "-o", path)
    *_, counted, named = ivon_post(*given).splitlines()
    labels = {label: sum(d.label == label for d in decisions) for label in LABELS}
    assert counted.startswith("24 texts: ")
    assert all(f"{label} {count}" in counted for label, count in labels.items() if count)
    answered = 100 * sum(not decision.abstain for decision in decisions) / 24
    assert counted.endswith(f"; answers {answered:.1f} %, and abstains below confidence 0.4")
    assert named == str(path)
    whole = path.read_bytes()
    check([json.loads(line) for line in whole.splitlines()], decisions)
    path.write_bytes(whole[: whole.index(b'"text": "rain') + 3])
    document = ivon_post.json(*given)
    assert (document["texts"], document["resumed"], document["choices"]) == (22, 2, LABELS)
    assert ivon_post(*given).splitlines()[-2] == counted.replace("24 texts", "24 texts (24 were there)")
    lines = path.read_bytes().splitlines()
    assert lines[:2] == whole.splitlines()[:2]
    check([json.loads(line) for line in lines], decisions)
    assert "made with threshold 0.4, not 0.5" in ivon_post.error(*given, "--threshold", 0.5, "--quiet")
    assert ivon_post.json(*given, "--threshold", 1, "--overwrite")["coverage"] == 0
    assert ivon_post.done(*words(tiny_adapter, "-o", path, "--overwrite"), stdin="").stdout.splitlines()[0] == "0 texts"
    assert path.read_bytes() == b""


def test_texts_come_from_stdin_and_spreadsheets_take_csv(
    tiny_adapter: Path, decisions: list[Decision], ivon_post: Cli
) -> None:
    lines = [*TEXTS[:3], "", json.dumps({"text": TEXTS[3]}), "{no JSON}"]
    given = words(tiny_adapter, "--threshold", 0.4, "--format", "csv")
    result = ivon_post.done(*given, stdin="\n".join(lines) + "\n")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["line"], row["text"]) for row in rows] == [
        ("1", TEXTS[0]), ("2", TEXTS[1]), ("3", TEXTS[2]), ("5", TEXTS[3]), ("6", "{no JSON}")
    ]  # fmt: skip
    for row, decision in zip(rows, decisions[:4], strict=False):
        assert (row["label"], row["abstain"]) == (decision.label, str(decision.abstain))
        probabilities = {label: float(row[f"p({label})"]) for label in LABELS}
        assert probabilities == pytest.approx(decision.probabilities, rel=1e-4)
        assert float(row["confidence"]) == probabilities[row["label"]]
    assert result.stderr.splitlines()[-1].startswith("5 texts: ")
    one = ivon_post.done(*words(tiny_adapter, "--limit", 1), stdin=lines[0])
    assert one.stderr.splitlines()[-1].startswith("1 text: ")
    result = ivon_post.done(*words(tiny_adapter, "--json", "--quiet", "--limit", 2), stdin="\n".join(lines))
    document = json.loads(result.stdout)
    assert (result.stderr, document["coverage"], document["temperature"]) == ("", None, 1)
    assert [line["text"] for line in document["decisions"]] == TEXTS[:2]
    assert "abstain" not in document["decisions"][0]
    line = ivon_post.error(*words(tiny_adapter, "-q"), stdin="caf\xe9".encode("latin-1"))
    assert line.startswith("Error: stdin:1: not UTF-8 text (unexpected end of data at byte 3)")
    line = ivon_post.error(*words(tiny_adapter, "-q"), stdin='{"text": "\\ud83d red"}')
    assert line.startswith("Error: stdin:1: holds half a surrogate pair")


def test_the_adapters_own_recommendation_is_taken_unless_draws_are_asked_for(
    tiny_adapter: Path, copied: Callable[[Path], Path], data: Path, decisions: list[Decision], ivon_post: Cli
) -> None:
    folder = copied(tiny_adapter)
    (folder / "recommended.json").write_text('{"tau": "inf", "ratio": 0.0, "temperature": 2.0, "threshold": 0.4}')
    given = ["predict", folder, "--choices", ",".join(LABELS), "--data", data]
    mean = ivon_post.done(*given)
    text = "taken from the adapter's recommended.json: the mean with T 2, abstaining below confidence 0.4"
    assert text in mean.stderr
    lines = [json.loads(line) for line in mean.stdout.splitlines()]
    check(lines, predict(folder, TEXTS, LABELS))
    drawn = ivon_post.done(*given, "-n", 2, "--threshold", 0.4, "--no-recommended")
    check([json.loads(line) for line in drawn.stdout.splitlines()], decisions)
    assert "recommended.json" not in drawn.stderr


def test_temperature_and_threshold_are_of_what_they_were_chosen_for(
    tiny_adapter: Path, data: Path, tmp_path: Path, ivon_post: Cli
) -> None:
    path = tmp_path / "chosen.json"
    path.write_text('{"tau": 4.0, "ratio": 0.0, "temperature": 2.0, "threshold": 0.4}')
    given = ["predict", tiny_adapter, "--choices", ",".join(LABELS), "--data", data, "-n", 2]
    plain = ivon_post(*given, "--tau", 1)
    other = ivon_post.done(*given, "--recommended", path, "--tau", 1)
    assert other.stdout == plain
    left = (
        "chosen.json is for draws at τ 4 with T 2, abstaining below confidence 0.4: T, threshold and sets are left out"
    )
    assert left in other.stderr
    same = ivon_post.done(*given, "--recommended", path, "--tau", 4)
    assert same.stdout == ivon_post(*given, "--recommended", path) != ivon_post(*given, "--tau", 4)
    assert "left out" not in same.stderr


def test_sets_are_those_that_a_sweep_has_found(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 40)
    grid = ["--tau", "1,inf", "--ratio", 0, "-n", 2]
    swept = ivon_post.json("sweep", tiny_adapter, "--data", chats, *grid, "--coverage", 0.9, "-o", tmp_path / "sweep")
    sets = swept["prediction_set"]
    assert (sets["coverage"], sets["examples"]) == (0.9, 20)
    given = ["predict", tiny_adapter, "--choices", "A,B", "--data", chats, "--recommended", swept["files"][0]]
    lines = [json.loads(line) for line in ivon_post(*given, "--set", 0.9).splitlines()]
    for line in lines:
        inside = [label for label, p in line["probabilities"].items() if p >= sets["threshold"]]
        assert set(line["set"]) == {*inside, line["label"]}
    assert {len(line["set"]) for line in lines} <= {1, 2}
    assert "there are no sets of that coverage" in ivon_post.run(*given, "--set", 0.8).stderr.splitlines()[-1]
    Path(swept["files"][0]).write_text(
        json.dumps({**json.loads(Path(swept["files"][0]).read_text()), "tau": "inf", "draws": None})
    )
    refusal = ivon_post.run(*given, "--set", 0.9, "-n", 2).stderr.splitlines()[-1]
    assert "--set 0.9: there are no sets of that coverage; leave --samples out" in refusal
    assert "set" not in json.loads(ivon_post(*given, "--limit", 1))


def test_a_recommendation_by_length_is_followed(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    labels = ["yes no", "A"]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"text": f"sun {n}", "label": labels[n % 2]}) + "\n" for n in range(8)))
    words = ["--data", chats, "--choices", ",".join(labels), "-n", 1]
    sweep = ["sweep", tiny_adapter, *words, "--tau", "1,inf", "--ratio", 0, "--by-length", "-o", tmp_path / "sweep"]
    swept = ivon_post.json(*sweep)
    assert swept["by_length"] is True
    given = ["predict", tiny_adapter, *words]
    by_length = ivon_post(*given, "--tau", "inf", "--by-length")
    assert by_length != ivon_post(*given, "--tau", "inf")
    (tmp_path / "by_length.json").write_text('{"tau": "inf", "ratio": 0, "by_length": true}')
    assert ivon_post("predict", tiny_adapter, *words[:4], "--recommended", tmp_path / "by_length.json") == by_length
    rows = ["eval", tiny_adapter, *words, "--rows", "mean"]
    evaluated = ivon_post.json(*rows, "--recommended", tmp_path / "by_length.json")
    assert evaluated == ivon_post.json(*rows, "--by-length")
    assert evaluated["by_length"] is True
