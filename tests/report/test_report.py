"""What a report reads: documents of this adapter and this evaluation, and none of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli
from tiny import write_chats

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.report.findings import Findings

HEADER = {"mean_sha256": "a" * 64}


@pytest.fixture
def written(known: Findings, tmp_path: Path) -> Any:
    """A function that writes the evaluation with some changes, and its examples, and returns the first path."""

    def write(**changes: Any) -> Path:
        document = {**known.evaluation.dump(), **HEADER, "output": "gone/examples.jsonl", **changes}
        (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line.dump()) + "\n" for line in known.examples))
        (tmp_path / "eval.json").write_text(json.dumps(document))
        return tmp_path / "eval.json"

    return write


def test_examples_lie_where_eval_wrote_them_or_beside_it(known: Findings, written: Any, tmp_path: Path) -> None:
    assert list(Findings.read(HEADER, written()).examples) == list(known.examples)
    moved = (tmp_path / "examples.jsonl").rename(tmp_path / "moved.jsonl")
    assert Findings.read(HEADER, tmp_path / "eval.json").examples == ()
    assert len(Findings.read(HEADER, tmp_path / "eval.json", moved).examples) == len(known.examples)
    assert Findings.read(HEADER) == Findings()
    lines = [line for line in known.examples if line.data == "other.jsonl"]
    expected = [float(line.rows["mean"].right or 0) for line in lines]
    assert known.values("other.jsonl", "mean", "correct").tolist() == expected
    assert np.isnan(known.values("other.jsonl", "posterior+temperature", "mutual_information")).all()
    assert len(known.values("other.jsonl", "nobody", "correct")) == 0
    assert known.threshold == 0.6
    agreement = known.sweep.model_copy(update={"score": "agreement"}) if known.sweep else None
    assert Findings(sweep=agreement).threshold is None


def test_documents_of_something_else_are_refused(known: Findings, written: Any, tmp_path: Path) -> None:
    with pytest.raises(IVONError, match=r"eval\.json is of another adapter"):
        Findings.read({"mean_sha256": "b" * 64}, written())
    with pytest.raises(IVONError, match="give the eval that belongs to it too"):
        Findings.read(HEADER, None, tmp_path / "examples.jsonl")
    sweep = tmp_path / "recommended.json"
    assert known.sweep is not None
    known.sweep.model_copy(update={"mean_sha256": "c"}).save(sweep)
    with pytest.raises(IVONError, match=r"recommended\.json was chosen for another adapter"):
        Findings.read(HEADER, sweep=sweep)
    rows = [row.dump() for row in known.evaluation.rows]
    path, lines = written(), (tmp_path / "examples.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    mean = first["rows"]["mean"]
    for changed in (
        {**first, "data": "x"},
        {**first, "rows": {name: row for name, row in first["rows"].items() if name != "base"}},
        {**first, "rows": {**first["rows"], "mean": {**mean, "right": not mean["right"]}}},
    ):
        (tmp_path / "examples.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
        with pytest.raises(IVONError, match=r"examples\.jsonl is of another evaluation: it does not agree with"):
            Findings.read(HEADER, path)
    part = {**rows[0], "name": "recommended, answered", "coverage": 0.5, "accuracy": 1.0}
    assert Findings.read(HEADER, written(rows=[*rows, part])).examples, "a part of a row has no examples of its own"


def test_it_measures_what_eval_measures(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    data = write_chats(tmp_path / "a.jsonl", 12)
    header = Posterior.from_pretrained(tiny_adapter).metadata
    sweep = {"tau": 2.0, "ratio": 0.2, "temperature": 1.5, "threshold": 0.51, "mean_sha256": header["mean_sha256"]}
    (tmp_path / "recommended.json").write_text(json.dumps(sweep))
    common = ["--data", data, "-q"]
    chosen = ["--recommended", tmp_path / "recommended.json"]
    evaluated = ivon_post("eval", tiny_adapter, *common, *chosen, "-o", tmp_path / "lines.jsonl", "--json")
    (tmp_path / "eval.json").write_text(evaluated)
    for name, given in (("one", common), ("other", ["--eval", tmp_path / "eval.json", "-q"])):
        ivon_post("report", tiny_adapter, *given, "--sweep", tmp_path / "recommended.json", "-o", tmp_path / name)
    assert "recommended, answered" in (tmp_path / "one").read_text()
    assert (tmp_path / "one").read_text() == (tmp_path / "other").read_text()
