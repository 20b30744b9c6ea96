"""The text of an answer that grows by tokens is the text of all its tokens, up to the first stop."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from tiny import WORDS

from axolotl_ivon.serving.api.answers import Token
from axolotl_ivon.serving.local.text import GrowingText

STRINGS = st.lists(st.sampled_from([*WORDS, " ", "é", "🙂", "漢", "\n", "ab", "<|im_start|>"]), max_size=12).map(
    "".join
)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def grow(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[tuple[str, tuple[Token, ...]]], GrowingText]:
    """Return what is shown for each token, and at the end."""
    text = GrowingText(lambda own: decode(tokenizer, list(own)), stop)
    shown = []
    for id in ids:
        token = Token(id, "", text.add(id), 0.0, (), 0.0, 0.0)
        shown.append(text.release(token))
        if text.stopped:
            break
    return [*shown, text.rest()], text


@given(STRINGS | st.lists(st.integers(0, 399), max_size=20))
def test_the_parts_are_the_whole(tokenizer: Any, content: str | list[int]) -> None:
    if isinstance(content, str):
        ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    else:
        ids = [id for id in content if id < len(tokenizer)]
    shown, _ = grow(tokenizer, ids)
    assert "".join(text for text, _ in shown) == decode(tokenizer, ids)
    tokens = [token for _, own in shown for token in own]
    assert [token.id for token in tokens] == ids
    assert "".join(token.text for token in tokens) == decode(tokenizer, ids)


@given(
    string=STRINGS, stop=st.lists(st.sampled_from([" ", "d", "ab", "aab", "moon", "é", "🙂漢"]), min_size=1, max_size=3)
)
@example(string="bluemoon", stop=["moon"])  # a token has a part of it
def test_it_ends_before_the_first_stop_and_shows_no_part_of_it(tokenizer: Any, string: str, stop: list[str]) -> None:
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    whole = decode(tokenizer, ids)
    shown, text = grow(tokenizer, ids, tuple(stop))
    expected = whole[: min((place for s in stop if (place := whole.find(s)) >= 0), default=len(whole))]
    assert "".join(text for text, _ in shown) == expected
    assert text.stopped == any(s in whole for s in stop)
    assert "".join(token.text for _, own in shown for token in own) == expected


def test_half_a_character_is_held_back(tokenizer: Any) -> None:
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    shown, _ = grow(tokenizer, ids)
    assert [text for text, _ in shown] == ["", "é", ""]
    shown, _ = grow(tokenizer, ids[:1])
    assert [text for text, _ in shown] == ["", "�"]
