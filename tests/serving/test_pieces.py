"""The text of an answer that grows by tokens is the text of all its tokens, up to the first stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS

from axolotl_ivon.models.session import load_tokenizer
from axolotl_ivon.serving.pieces import Text, Token, answer_facts, token_facts

STRINGS = st.lists(st.sampled_from([*WORDS, " ", "é", "🙂", "漢", "\n", "ab", "<|im_start|>"]), max_size=12).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama, str(tiny_llama))


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def grow(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[tuple[str, tuple[Token, ...]]], Text]:
    """Return what is given out for each token, and at the end."""
    text = Text(lambda own: decode(tokenizer, list(own)), stop)
    given = []
    for id in ids:
        token = Token(id, "", text.add(id), 0.0, (), 0.0, 0.0, 0.0)
        given.append(text.take(token))
        if text.stopped:
            break
    return [*given, text.rest()], text


@given(string=STRINGS)
def test_the_parts_are_the_whole(tokenizer: Any, string: str) -> None:
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    given, _ = grow(tokenizer, ids)
    assert "".join(text for text, _ in given) == decode(tokenizer, ids)
    tokens = [token for _, own in given for token in own]
    assert [token.id for token in tokens] == ids
    assert "".join(token.text for token in tokens) == decode(tokenizer, ids)


@given(
    string=STRINGS, stop=st.lists(st.sampled_from([" ", "d", "ab", "aab", "moon", "é", "🙂漢"]), min_size=1, max_size=3)
)
def test_it_ends_before_the_first_stop_and_never_shows_a_part_of_it(
    tokenizer: Any, string: str, stop: list[str]
) -> None:
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    whole = decode(tokenizer, ids)
    given, text = grow(tokenizer, ids, tuple(stop))
    expected = whole[: min((place for s in stop if (place := whole.find(s)) >= 0), default=len(whole))]
    assert "".join(text for text, _ in given) == expected
    assert text.stopped == any(s in whole for s in stop)
    assert "".join(token.text for _, own in given for token in own) == expected


@given(st.lists(st.integers(0, 399), max_size=20))
def test_any_tokens_are_decoded(tokenizer: Any, ids: list[int]) -> None:
    ids = [id for id in ids if id < len(tokenizer)]
    given, _ = grow(tokenizer, ids)
    assert "".join(text for text, _ in given) == decode(tokenizer, ids)


def test_half_a_character_is_held_back(tokenizer: Any) -> None:
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    given, _ = grow(tokenizer, ids)
    assert [text for text, _ in given] == ["", "é", ""]
    given, _ = grow(tokenizer, ids[:1])
    assert [text for text, _ in given] == ["", "�"]


def test_facts_are_those_of_the_tokens() -> None:
    tokens = [
        Token(0, "a", "a", math.log(0.5), (), math.log(0.9), 0.2, 0.1),
        Token(1, "b", "b", -1, (), math.log(0.4), 0.4, 0.3),
    ]
    facts = answer_facts(tokens, 8, None)
    assert facts == pytest.approx(
        {"confidence": math.sqrt(0.36), "expected_entropy": 0.3, "mutual_information": 0.2, "members": 8}
    )
    assert [answer_facts(tokens, 8, t)["abstain"] for t in (0.59, 0.6, 0.61)] == [False, False, True]
    assert token_facts(tokens[0]) == {
        "token": "a", "probability": pytest.approx(0.5), "expected_entropy": 0.2, "mutual_information": 0.1,
    }  # fmt: skip
