"""Every document comes back as it was written, loads from older versions, and names the first wrong field."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.records import influence
from axolotl_ivon.records.base import Record, save_lines
from axolotl_ivon.records.ensemble import EnsembleRecord
from axolotl_ivon.records.evaluation import EvaluationRecord, ExampleRecord
from axolotl_ivon.records.nbest import NBestRecord, NBestSettings
from axolotl_ivon.records.recommendation import Recommendation

ROW = {"name": "mean", "data": "a.jsonl", "examples": 3, "accuracy": 0.5, "se": {"accuracy": 0.1, "ece": None}}
PREDICTION = {"right": True, "confidence": 0.9, "entropy": 0.3, "mutual_information": None}
INFLUENCE = {"index": 0, "loss": 0.5, "leverage": 1, "sensitivity": 2.0, "on": None, "line": 1}
POINT = {"tau": "inf", "ratio": 0.0, "chosen_on": {"nll": 0.5}, "reported_on": {"nll": 0.6}, "front": True}
WHOLE: dict[type[Record], dict[str, Any]] = {
    EvaluationRecord: {
        "rows": [{**ROW, "versus_mean+temperature": {"nll": {"difference": -0.1, "standard_error": None}}}],
        "ood": [{"name": "mean", "data": "b.jsonl", "score": "entropy", "auroc": 0.5, "se": {"auroc": 0.1}}],
        "verdicts": [{"data": "a", "name": "mean", "than": "base", "metric": "nll", "verdict": "better", "text": "…"}],
        "tau": "inf",
        "calibration": {"data": "c.jsonl", "examples": 5, "temperatures": {"mean+temperature": 1.5}},
        "of a later version": {"nested": [1]},
    },
    ExampleRecord: {"data": "a.jsonl", "line": 2, "answer": "B", "rows": {"mean": PREDICTION}},
    Recommendation: {
        "tau": "inf", "ratio": 0, "threshold": None, "data": ["a.jsonl"], "adapter_tau": "inf",
        "reported_on": {"nll": 0.6, "se": {"nll": 0.01}}, "best": POINT, "grid": [POINT],
        "verdict": {"outcome": "the mean", "text": "…"},
    },
    influence.InfluenceRecord: INFLUENCE,
    EnsembleRecord: {"source": "/a", "seed": 5, "tau": "inf", "pruned_ratio": 0.3, "members": ["mean", "sample-0000"]},
    NBestRecord: {"prompt": "2+2", "reference": None, "outputs": [{"text": "4", "member": 1, "logprob": -0.5}]},
    NBestSettings: {"adapter": "ab", "tau": "inf", "prune_ratio": 0.0, "n": 4},
}  # fmt: skip


@pytest.mark.parametrize("record", WHOLE, ids=lambda record: record.__name__)
def test_a_record_comes_back_as_it_was(record: type[Record], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    loaded = record.parse(WHOLE[record], "here")
    assert loaded.dump() == WHOLE[record]
    loaded.save(path)
    assert record.load(path, "results") == loaded
    save_lines(path, [loaded, loaded])
    assert [line for _, line in record.load_lines(path, "file")] == [loaded, loaded]


def test_files_of_0_2_0_load() -> None:
    old = EvaluationRecord.parse({"rows": [ROW], "task": "choice", "tau": 1.0}, "here")
    assert (old.ood, old.verdicts, old.rows[0].versus("mean"), old.rows[0].temperature) == ([], [], {}, 1)
    facts = {"tau": 2.0, "ratio": 0.1, "mean_reported_on": None, "grid": [POINT]}
    assert Recommendation.parse(facts, "here").temperature == 1


@pytest.mark.parametrize(
    ("changes", "header", "message"),
    [
        ({}, {"sigma_sha256": "d", "tau": "4.0"}, ""),
        ({"mean_sha256": None}, {}, "does not say of which adapter it is (mean_sha256); write it anew with"),
        ({"mean_sha256": "b"}, {}, "is of another adapter, out (mean_sha256 differs); write it anew with `ivon-post"),
        ({"sigma_sha256": "c"}, {"sigma_sha256": "c"}, ""),
        (
            {"sigma_sha256": "c"},
            {"sigma_sha256": "d"},
            "is of another σ around this mean (sigma_sha256 differs); write",
        ),
        ({"sigma_sha256": "c"}, {}, "is of another σ around this mean"),
        ({"sigma_sha256": "c", "adapter_tau": 4.0}, {"sigma_sha256": "c", "tau": "4.0"}, ""),
        (
            {"sigma_sha256": "c"},
            {"sigma_sha256": "c", "tau": "4.0"},
            "is of this adapter at τ 1, and it is at 4.0; wri",
        ),
    ],
)
def test_results_are_of_one_mean_and_one_sigma(
    changes: dict[str, Any], header: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Older ones say nothing of σ."""
    document = {"rows": [ROW], "adapter": "out", "mean_sha256": "a", **changes}
    (tmp_path / "eval.json").write_text(json.dumps(document))
    if not message:
        assert (
            EvaluationRecord.load(tmp_path / "eval.json", "results", {"mean_sha256": "a", **header}).dump() == document
        )
        return
    with pytest.raises(IVONError, match=re.escape(message)):
        EvaluationRecord.load(tmp_path / "eval.json", "results", {"mean_sha256": "a", **header})


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        (EvaluationRecord, {"rows": []}, "rows is []; "),
        (EvaluationRecord, {"rows": 3}, "rows is 3; it must be a valid list"),
        (EvaluationRecord, {"rows": [ROW, {"data": "a"}]}, "rows[1]: it has no `name`"),
        (EvaluationRecord, {"rows": [{**ROW, "se": {"nll": "0"}}]}, "rows[0].se.nll is '0'; it must be a valid number"),
        (EvaluationRecord, {"rows": [{**ROW, "nll": math.nan}]}, "rows[0].nll is nan; it must be a finite number"),
        (EvaluationRecord, {"ood": [{"name": "mean", "score": "entropy"}]}, "ood[0]: it has no `data`"),
        (EvaluationRecord, {"tau": 0}, "tau is 0; it must be greater than 0"),
        (EvaluationRecord, {"tau": "hot"}, "tau is 'hot'; it must be a number > 0, or \"inf\""),
        (ExampleRecord, {"rows": {"mean": {"confidence": 0.9}}}, "it must have `right` or `accuracy`"),
        (ExampleRecord, {"rows": {"mean": {**PREDICTION, "entropy": True}}}, "rows.mean.entropy is True"),
        (influence.InfluenceRecord, {"on": "bad"}, "on is 'bad'"),
        (EnsembleRecord, {"members": []}, "members is []"),
        (EnsembleRecord, {"members": ["a", "../b"]}, "members[1] is '../b'; it must be the name of a folder"),
        (NBestRecord, {"outputs": []}, "outputs is []; "),
        (NBestRecord, {"outputs": [{"text": 4}]}, "outputs[0].text is 4; it must be a valid string"),
        (NBestRecord, {"outputs": [{"text": "4", "member": "first"}]}, "outputs[0].member is 'first'"),
        (NBestRecord, {"outputs": [{"text": "4", "logprob": math.inf}]}, "outputs[0].logprob is inf"),
        (NBestSettings, {"ensemble": {"tau": "?"}}, "ensemble.tau is '?'"),
    ],
)
def test_the_first_wrong_field_is_named(record: type[Record], change: dict[str, Any], message: str) -> None:
    whole = rf"^FILE:7: .*{re.escape(message)}.*; give what `{record.written_by}` writes$"
    with pytest.raises(IVONError, match=whole):
        record.parse({**WHOLE[record], **change}, "FILE:7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"ratio": 0}', "it has no `tau`"),
        ('{"tau": NaN, "ratio": 0}', "not valid JSON"),
        ('{"tau": 1e999, "ratio": 0}', "not valid JSON"),
        ('{"tau": 1' + "0" * 400 + ', "ratio": 0}', "tau is 10"),
        ('{"tau": true, "ratio": 0}', "tau is True"),
        ('{"tau": 1, "ratio": 1.5}', "ratio is 1.5"),
        ('{"tau": 1, "ratio": 0, "temperature": 0}', "temperature is 0"),
        ('{"tau": 1, "ratio": 0, "threshold": 1.5}', "threshold is 1.5"),
        ('{"tau": 1, "ratio": 0, "adapter_tau": -1}', "adapter_tau is -1"),
        (None, "has no recommended.json"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "recommended.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(IVONError, match=message) as caught:
        Recommendation.load(path, "recommended")
    assert (caught.value.parameter, path.name in str(caught.value)) == ("recommended", True)


def test_nothing_is_written_of_a_record_with_a_number_that_json_lacks(tmp_path: Path) -> None:
    record = Recommendation(tau=math.inf, ratio=0.0, later=math.nan)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="JSON"):
        record.save(tmp_path / "recommended.json")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_influence_are_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "influence.jsonl"
    rows = [influence.InfluenceRecord.parse({**INFLUENCE, "index": i}, "here") for i in range(3)]
    save_lines(path, rows)
    assert influence.load(path, "scores", {"mean_sha256": "a"}) == rows
    assert [rows[0].score(name) for name in influence.SCORES] == [0.5, 1, 2.0, None]
    save_lines(path, rows[1:])
    with pytest.raises(IVONError, match=r"influence.jsonl:1: index is 1, not 0; write the file anew"):
        influence.load(path, "scores", {"mean_sha256": "a"})
    mine = {**INFLUENCE, "mean_sha256": "a"}
    save_lines(path, [influence.InfluenceRecord.parse(mine, "here")])
    assert influence.load(path, "scores", {"mean_sha256": "a"})[0].dump() == mine
    with pytest.raises(IVONError, match=r"influence.jsonl is of another adapter \(mean_sha256 differs\)") as caught:
        influence.load(path, "scores", {"mean_sha256": "b"})
    assert caught.value.parameter == "scores"


def test_outputs_know_what_they_were_drawn_from() -> None:
    assert NBestSettings(adapter="a", tau=2.0, prune_ratio=0.1).source == {"tau": 2.0, "ratio": 0.1, "mean_sha256": "a"}
    served = NBestSettings.parse({"engine": "endpoint", "ensemble": {"tau": 3.0, "pruned_ratio": 0.2}}, "here")
    assert served.source == {"tau": 3.0, "ratio": 0.2, "mean_sha256": None}
