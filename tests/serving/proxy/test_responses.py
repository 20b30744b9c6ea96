"""Responses of servers: of chats and of completions, and what no server should write."""

from __future__ import annotations

import math
from typing import Any

import pytest

from axolotl_ivon.serving.proxy.responses import read_candidates, read_prompt_ids, read_text, read_tokens

TOPS = {"a": math.log(0.6), "b": math.log(0.3)}
CHAT = {
    "content": [
        {"token": "a", "logprob": TOPS["a"], "top_logprobs": [{"token": t, "logprob": p} for t, p in TOPS.items()]}
    ]
}
COMPLETION = {"tokens": ["a"], "token_logprobs": [TOPS["a"]], "top_logprobs": [TOPS]}


@pytest.mark.parametrize("logprobs", [CHAT, COMPLETION], ids=["chat", "completion"])
def test_both_forms_have_the_same_tokens(logprobs: dict[str, Any]) -> None:
    [token] = read_tokens(logprobs, 1)
    assert (token.name, token.logprob, token.top) == ("a", TOPS["a"], (("a", TOPS["a"]),))
    assert token.expected_entropy == pytest.approx(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1)))
    assert read_tokens(None, 1) == []


def test_a_candidate_has_the_sum_of_its_tokens_and_says_whether_it_has_ended() -> None:
    choice = {"text": "a", "logprobs": COMPLETION, "finish_reason": "stop", "token_ids": [5]}
    response = {"choices": [choice, {**choice, "stop_reason": "END", "logprobs": None}], "prompt_token_ids": [1, 2]}
    whole, stopped = read_candidates(response, 3)
    assert (whole.member, whole.logprob, whole.ids, whole.ended) == (3, TOPS["a"], (5,), True)
    assert (stopped.logprob, stopped.ended) == (-math.inf, False)
    assert read_prompt_ids(response) == [1, 2]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"message": {"content": "a"}}, "a"),
        ({"delta": {}}, ""),
        ({"text": "a"}, "a"),
        ({"message": {"content": None}}, ""),
    ],
)
def test_texts_of_every_form(choice: dict[str, Any], text: str) -> None:
    assert read_text(choice) == text


def test_a_text_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError):
        read_text({"text": 5})
