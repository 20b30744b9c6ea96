"""Numbers and tables as they are printed."""

from __future__ import annotations

import json

import pytest

from ivon_post._tables import decimal, emit, number, percent, print_table


def test_numbers() -> None:
    assert [number(None), number(0.0123456)] == ["–", "0.0123"]
    assert [percent(None), percent(0.8512), percent(0.5, 0.01), percent(0.0)] == ["–", "85.1", "50.0 ± 1.0", "0.0"]
    assert [decimal(None), decimal(0.5), decimal(0.5, 0.25)] == ["–", "0.500", "0.500 ± 0.250"]


def test_a_table_has_every_character(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["module", "n"], [["x" * 200, "1"], ["[/bold]", "22"]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["module", "n"], ["x" * 200, "1"], ["[/bold]", "22"]]


def test_a_document_has_only_what_json_knows(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": [1.5, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        emit({"a": float("inf")})
