"""`ivon-post mbr` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli


def write(path: Path, answers: list[list[str]], references: list[str | None]) -> Path:
    lines = [
        {
            "prompt": f"{i}?",
            "reference": reference and f"#### {reference}",
            "outputs": [{"text": f"so #### {a}", "member": j // 8, "logprob": -float(j)} for j, a in enumerate(own)],
        }
        for i, (own, reference) in enumerate(zip(answers, references, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    right = [["1"] * 10 + ["2"] * 6, ["3"] * 16]
    wrong = [["2"] * 10 + ["1"] * 6, ["3"] * 16]
    return [
        write(tmp_path / "mean.jsonl", wrong, ["1", "3"]),
        write(tmp_path / "pruned.jsonl", right, ["1", "3"]),
    ]


def test_json_holds_accuracy_curve_and_files(ivon_post: Cli, files: list[Path], tmp_path: Path) -> None:
    found = ivon_post.json("mbr", files[0], f"posterior, pruned={files[1]}", "-a", "gsm8k", "-o", tmp_path / "out")
    assert found["accuracy"] == 0.5
    assert [result["label"] for result in found["results"]] == ["mean", "posterior, pruned"]
    assert [result["accuracy"] for result in found["results"]] == [0.5, 1.0]
    assert [point["n"] for point in found["results"][0]["curve"]] == [8, 16]
    # The members differ on the first problem alone, and there the mean's choice is wrong.
    assert found["results"][0]["auroc"] == 1.0
    assert found["results"][1]["auroc"] is None
    names = ["mean.jsonl", "posterior, pruned.jsonl", "accuracy.png", "accuracy.svg"]
    assert found["files"] == [str(tmp_path / "out" / name) for name in names]
    chosen = [json.loads(line)["answer"] for line in (tmp_path / "out" / "mean.jsonl").read_text().splitlines()]
    assert chosen == ["2", "3"]


def test_the_table_has_a_row_for_each_file(ivon_post: Cli, files: list[Path]) -> None:
    lines = ivon_post("mbr", *files, "-a", "gsm8k", "--utility", "chrf").splitlines()
    assert lines[1].split() == ["one", "n", "=", "8", "n", "=", "16", "chrf", "AUROC"]
    assert [line.split()[:2] for line in lines[2:4]] == [["mean", "(2)"], ["pruned", "(2)"]]
    assert lines[4] == str(files[0].parent / "mean-mbr" / "mean.jsonl")


def test_outputs_without_an_answer_are_counted(ivon_post: Cli, files: list[Path]) -> None:
    first = json.loads(files[0].read_text().splitlines()[0])
    first["outputs"][0]["text"] = "[/INST] seven"
    files[0].write_text(json.dumps(first) + "\n")
    result = ivon_post.run("mbr", files[0], "-a", "gsm8k")
    assert result.exit_code == 0
    assert "mean: no answer in 1 of 16 outputs, '[/INST] seven' for one" in result.stderr
    quiet = ivon_post.run("mbr", files[0], "-a", "gsm8k", "--json", "--quiet", "--overwrite")
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["results"][0]["unmatched"] == 1


def test_files_without_references_give_choices(ivon_post: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [["1", "2", "2"]], [None])
    out = ivon_post("mbr", path, "-a", "gsm8k")
    assert "f: 1 prompts, no references" in out
    assert json.loads((tmp_path / "f-mbr" / "f.jsonl").read_text())["answer"] == "2"
    assert ivon_post.json("mbr", path, "--overwrite")["accuracy"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/no.jsonl"], "no.jsonl: cannot be read"),
        (["{file}", "-a", "["], "--answer-regex '[': not a regular expression"),
        (["{file}", "-a", "boxed"], "matches none of the 32 outputs"),
        (["{file}", "{file}"], "the label 'mean' is taken"),
        (["{file}", "-o", "{tmp}"], "is there; choose another name with --output"),
        (["{file}", "-o", "{file}", "--overwrite"], "is there; choose another name with --output"),
        (["{file}", "--utility", "bertscore"], "pip install bert-score"),
    ],
)
def test_bad_input_is_one_line(
    ivon_post: Cli, files: list[Path], tmp_path: Path, monkeypatch: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bert_score", None)
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(tmp=tmp_path, file=files[0]) for argument in arguments]
    assert message in ivon_post.error("mbr", *given, "--quiet")
    assert sorted(tmp_path.rglob("*")) == before
