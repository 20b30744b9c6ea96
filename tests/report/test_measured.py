"""What a report is made of: read from files that agree, or measured as `eval` measures it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli
from tiny import write_chats

from axolotl_ivon import IVONError
from axolotl_ivon.report.measured import Measured, measure, read

HEADER = {"mean_sha256": "abc"}


@pytest.fixture
def written(known: Measured, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes eval.json, which names examples.jsonl beside it, and returns its path."""

    def write(examples: bool = True, **changes: Any) -> Path:
        document = {**known.document, "mean_sha256": "abc", "output": "elsewhere/examples.jsonl", **changes}
        (tmp_path / "eval.json").write_text(json.dumps(document))
        if examples:
            lines = [json.dumps(line) for line in known.examples]
            (tmp_path / "examples.jsonl").write_text("\n".join(lines))
        return tmp_path / "eval.json"

    return write


def test_what_was_written_is_read(known: Measured, written: Callable[..., Path], tmp_path: Path) -> None:
    found = read(HEADER, written())
    assert found.document["rows"] == known.document["rows"]
    assert list(found.examples) == list(known.examples)
    assert found.ood_files() == ["other.jsonl"]
    right = found.of("other.jsonl", "mean", "right")
    assert right.tolist() == [line["rows"]["mean"]["right"] for line in known.examples if line["data"] == "other.jsonl"]
    assert np.isnan(found.of("other.jsonl", "posterior+temperature", "mutual_information")).all()
    (tmp_path / "r.json").write_text('{"tau": 1, "mean_sha256": "abc"}')
    assert read(HEADER, recommended=tmp_path / "r.json").recommended["tau"] == 1
    (tmp_path / "examples.jsonl").rename(tmp_path / "moved.jsonl")
    assert read(HEADER, written(examples=False)).examples == []
    assert list(read(HEADER, written(examples=False), tmp_path / "moved.jsonl").examples) == list(known.examples)


def test_files_that_do_not_belong_together_are_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    written()
    with pytest.raises(IVONError, match=r"results .* is of another adapter, other"):
        read({"mean_sha256": "x"}, written(adapter="other"))
    for changes in ({"rows": []}, {"rows": [{"name": "mean"}]}, {"ood": [1]}):
        with pytest.raises(IVONError, match="does not hold what"):
            read(HEADER, written(**changes))
    with pytest.raises(IVONError, match="give the results that belong to it too"):
        read(HEADER, None, tmp_path / "examples.jsonl")
    with pytest.raises(IVONError, match=r"examples .*none\.jsonl: cannot be read"):
        read(HEADER, written(), tmp_path / "none.jsonl")
    for change, message in [
        (lambda line: line["rows"]["mean"].update(right=not line["rows"]["mean"]["right"]), "is of another evaluation"),
        (lambda line: line.update(data="x"), "is of another evaluation"),
        (lambda line: line["rows"].pop("base"), "is of another evaluation"),
        (lambda line: line.update(rows=3), "it is no line of what"),
        (lambda line: line["rows"]["mean"].update(confidence="high"), "it is no line of what"),
        (lambda line: line["rows"].update(mean=None), "it is no line of what"),
    ]:
        path = written()
        first, *rest = (tmp_path / "examples.jsonl").read_text().splitlines()
        line = json.loads(first)
        change(line)
        (tmp_path / "examples.jsonl").write_text("\n".join([json.dumps(line), *rest]))
        with pytest.raises(IVONError, match=message):
            read(HEADER, path)


def test_it_measures_what_eval_measures(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    data, other = write_chats(tmp_path / "a.jsonl", 12), write_chats(tmp_path / "b.jsonl", 8, seed=1)
    calibrate = write_chats(tmp_path / "c.jsonl", 8, seed=2)
    recommended = {"tau": 2.0, "ratio": 0.2, "temperature": 1.5, "threshold": 0.51, "score": "probability"}
    (tmp_path / "recommended.json").write_text(json.dumps(recommended))
    document = ivon_post.json(
        "eval", tiny_adapter, "--data", data, "--ood", other, "--calibrate", calibrate, "-n", 2, "--seed", 3,
        "--recommended", tmp_path / "recommended.json", "-o", tmp_path / "lines.jsonl", "-q",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    begun: list[str] = []
    found = measure(
        str(tiny_adapter), [str(data)], ood=[str(other)], calibrate=str(calibrate), recommended=recommended,
        run={"samples": 2, "seed": 3}, begin=lambda doing, total: begun.append(doing),
    )  # fmt: skip
    assert begun == ["loading the base model", "fitting temperatures", "evaluating", "bootstrap"]
    assert json.loads(json.dumps(found.document["rows"])) == document["rows"]
    assert "recommended, answered" in {row["name"] for row in document["rows"]}
    assert found.document["ood"] == document["ood"]
    assert found.document["verdicts"] == document["verdicts"]
    assert (found.document["tau"], found.document["prune_ratio"]) == (2.0, 0.2)
    assert json.loads(json.dumps(list(found.examples))) == lines
    (tmp_path / "eval.json").write_text(json.dumps(document))
    header = {"mean_sha256": document["mean_sha256"]}
    assert list(read(header, tmp_path / "eval.json").examples) == lines
    mean = measure(str(tiny_adapter), [str(data)], tau=math.inf, run={"samples": 2, "seed": 3})
    assert mean.document["tau"] == "inf"
    assert [row["name"] for row in mean.document["rows"]] == ["base", "mean", "posterior"]
    with pytest.raises(IVONError, match="recommended: tau is 'hot', which is no number"):
        measure(str(tiny_adapter), [str(data)], recommended={"tau": "hot"}, run={"samples": 1})
