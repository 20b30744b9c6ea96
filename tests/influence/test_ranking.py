"""Rows ranked by a score, and their data without the most suspicious ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import write_chats

from axolotl_ivon import IVONError
from axolotl_ivon.influence.ranking import check_same, flagged, save_without, suspicious
from axolotl_ivon.records.influence import InfluenceRecord


def test_the_most_suspicious_rows_are_left_out(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "data.jsonl", count=4)
    lines = data.read_bytes().splitlines()
    data.write_bytes(b"\r\n".join([lines[0], b"", *lines[1:]]))  # an empty line, Windows' ends, and none at the end
    texts = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    scores = [(0.1, 0.5), (3.0, 0.1), (None, None), (2.0, -2.0)]
    rows = [
        InfluenceRecord(
            index=i, loss=loss, leverage=1.0, sensitivity=loss, on=on, line=i + 1 + (i > 0), question=q, answer=a
        )
        for i, ((loss, on), (q, a)) in enumerate(zip(scores, texts, strict=True))
    ]
    check_same(rows, "scores.jsonl", data)
    assert suspicious(rows, "loss") == [1, 3, 0]
    assert suspicious(rows, "on") == [3, 1, 0]
    assert flagged(rows, "on", 0.5) == [3, 1]
    assert flagged(rows, "loss", 0.01) == [1, 3, 0]
    save_without(tmp_path / "clean.jsonl", data, {rows[i].line or 0 for i in flagged(rows, "on", 0.75)})
    assert (tmp_path / "clean.jsonl").read_bytes() == b"\r\n".join([lines[0], b"", *lines[1:3]]) + b"\r\n"
    other = rows[1].model_copy(update={"answer": "?"})
    with pytest.raises(IVONError, match=r"scores.jsonl: row 1 has another answer, so they are of other data than data"):
        check_same([rows[0], other, *rows[2:]], "scores.jsonl", data)
    with pytest.raises(IVONError, match=r"3 rows, not 4, so they are of other data"):
        check_same(rows[:3], "scores.jsonl", data)
