"""Which answers are labels: few strings that come back."""

from __future__ import annotations

from collections import Counter

import pytest

from axolotl_ivon.storage.labels import are_amounts, are_labels


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("ABC", True),  # single characters, each once
        (["yes", "no"], False),  # each once
        (["yes", "no"] * 2, True),
        (["y" * 40, "no"] * 2, True),
        (["y" * 41, "no"] * 2, False),
        (["one\nline", "no"] * 2, False),
        ([f"label {i}" for i in range(200)] * 2, True),
        ([f"label {i}" for i in range(201)] * 2, False),
        ([f"label {i}" for i in range(27)] * 2 + ["new", "newer", "newest"], True),  # 3 of 57 are new
        ([f"label {i}" for i in range(27)] + ["label 0"] * 3, False),
        ([f"{i} %" for i in range(27)] * 2, False),  # amounts
    ],
    ids=str,
)
def test_labels_are_few_and_come_back(answers: list[str], expected: bool) -> None:
    assert are_labels(Counter(answers)) is expected


def test_amounts_are_many_and_have_no_letter() -> None:
    amounts = [str(i) for i in range(27)]
    assert are_amounts(amounts)
    assert not are_amounts(amounts[1:])
    assert not are_amounts([*amounts, "27 m"])
