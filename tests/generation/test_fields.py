"""The confidence of each field of a JSON answer, on candidates made by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.generation.fields import check_fields, check_outputs, compare, is_right, parse_json, summarize

TEXTS = (
    '{"name": "Ada", "born": {"year": 1815}, "tags": ["x", "y"]}',
    '```json\n{"born": {"year": 1815.0}, "name": "Ada"}\n```',
    'Sure! {"name": "Ada L.", "born": {"year": "1815"}} There.',
    "I do not know",
    '{"name": "Ada", "born": {}}',
)


def test_shares_are_counted_by_hand() -> None:
    weights = np.array([0.4, 0.2, 0.2, 0.1, 0.1])
    found = compare(TEXTS, weights, 0, ("name", "born.year", "tags.1", "nowhere"))
    values = {path: (f.value, f.present, f.confidence, f.missing, f.unparsable) for path, f in found.items()}
    assert values == {
        "name": ("Ada", True, 0.7, 0.0, 0.1),
        "born.year": (1815, True, 0.6, 0.1, 0.1),  # 1815.0 is the same, "1815" is not
        "tags.1": ("y", True, 0.4, 0.5, 0.1),
        "nowhere": (None, False, 0.9, 0.9, 0.1),
    }
    of_none = compare(TEXTS, weights, 3, ("name",))["name"]
    assert (of_none.present, of_none.confidence) == (False, 0.0)
    lacking = compare(TEXTS, weights, 4, ("born.year",))["born.year"]
    assert (lacking.present, lacking.confidence) == (False, 0.1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-4, 4) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_values_agree_where_their_json_is_equal(one: Any, other: Any) -> None:
    def strict(a: Any, b: Any) -> bool:
        if isinstance(a, bool) or isinstance(b, bool):
            return a is b
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(strict, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(strict(a[key], b[key]) for key in a)
        return a == b

    texts = [json.dumps({"a": value}) for value in (one, other, one)]
    agree = compare(texts, np.full(3, 1 / 3), 0, ("a",))["a"].confidence
    assert agree == pytest.approx(1 if strict(one, other) else 2 / 3)


@given(st.text(max_size=60) | st.text('{}[]":,` \n1ae', max_size=60))
def test_any_text_is_parsed_or_is_not(text: str) -> None:
    value = parse_json(text)
    assert isinstance(value, (dict, list)) or value is parse_json("nothing")


def test_what_nests_too_deep_is_no_json() -> None:
    assert parse_json("[" * 100_000 + "]" * 100_000) is parse_json("nothing")


def test_a_summary_says_accuracy_where_there_are_references() -> None:
    references = ['{"name": "Ada"}', '{"name": "Bo"}']
    found = [
        compare(['{"name": "Ada"}', '{"name": "Ada"}'], np.full(2, 0.5), 0, ("name",)),
        compare(['{"name": "Ada"}', "no"], np.full(2, 0.5), 0, ("name",)),
    ]
    expected = {"confidence": 0.75, "missing": 0.0, "unparsable": 0.25, "accuracy": 0.5, "auroc": 1.0}
    assert summarize(found, references) == {"name": expected}
    assert summarize(found, ["{}", None])["name"] == {**expected, "accuracy": None, "auroc": None}
    lacking = compare(["{}"], np.ones(1), 0, ("name",))["name"]
    assert is_right(lacking, "name", "{}")
    assert not is_right(lacking, "name", references[0])


def test_field_names_that_are_none_are_refused() -> None:
    assert check_fields("a, b.c") == ("a", "b.c")
    for given_ in ("", "a,", "a..b", "a,a", ".a"):
        with pytest.raises(IVONError, match="give different names with commas between"):
            check_fields(given_)


def test_outputs_without_json_or_field_are_told() -> None:
    with pytest.raises(IVONError, match=r"none of the 2 outputs in f\.jsonl is JSON, 'a' for one"):
        check_outputs(["a", "b"], ("x",), "f.jsonl")
    with pytest.raises(IVONError, match=r"no output in f\.jsonl has 'x\.y'; the first has x, z"):
        check_outputs(['{"x": 1, "z": 2}', "b"], ("z", "x.y"), "f.jsonl")
    check_outputs(TEXTS, ("name", "born.year"), "f.jsonl")
