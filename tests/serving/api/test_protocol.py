"""Requests are what OpenAI's own client sends, and responses what its types read; errors name the wrong field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from axolotl_ivon.serving.api.answer_schema import FreeString
from axolotl_ivon.serving.api.answers import AnswerDelta, Token, certainty_of
from axolotl_ivon.serving.api.protocol import (
    ApiError,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Writer,
    read_request,
    usage,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
TEXT = {"model": "m", "prompt": "?"}
TOKEN = Token(7, "é", "é", -0.5, (("é", -0.5), ("�", -1.5)), 0.2, 0.1)
IVON = {"confidence": 0.6, "expected_entropy": 0.2, "mutual_information": 0.1, "members": 2}


def schema(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    form = {"name": "x", "schema": {"type": "object", "properties": properties, **more}}
    return {**CHAT, "response_format": {"type": "json_schema", "json_schema": form}}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ({"enum": ["é", 1, None]}, ['"é"', "1", "null"]),
        ({"type": "string", "enum": ["a", "a"], "title": "A"}, ['"a"']),
        ({"const": 0.5}, ["0.5"]),
        ({"type": "boolean"}, ["true", "false"]),
        ({"type": "integer", "minimum": -1, "exclusiveMaximum": 2}, ["-1", "0", "1"]),
        ({"$ref": "#/$defs/C", "description": "c"}, ['"x"', '"y"']),
        ({"type": "string", "maxLength": 64, "title": "A"}, FreeString(64)),
        ({"type": "string", "maxLength": 65}, None),
        ({"type": "string", "maxLength": 4, "pattern": "a"}, None),
        ({"type": "string", "maxLength": True}, None),
        ({"type": "integer", "minimum": 0}, None),
        ({"type": "integer", "minimum": 0, "maximum": 1000}, None),
        ({"type": "integer", "minimum": 0, "maximum": 4, "multipleOf": 2}, None),
        ({"type": "number", "minimum": 0, "maximum": 1}, None),
        ({"enum": []}, None),
        ({"$ref": "#/$defs/D"}, None),
        ("a", None),
    ],
    ids=str,
)
def test_the_values_of_a_field(field: Any, values: list[str] | FreeString | None) -> None:
    asked = schema({"a": field}, **{"$defs": {"C": {"enum": ["x", "y"]}}})
    if values is None:
        with pytest.raises(ApiError, match="the field a needs an enum"):
            read_request(ChatRequest, asked)
    else:
        assert read_request(ChatRequest, asked).fields == {"a": values}


def test_each_text_to_classify_is_a_chat_with_choices() -> None:
    asked = read_request(ClassifyRequest, {"model": "m", "input": ["a", "b"]})
    requests = asked.requests(["x", "y"])
    assert [request.prompts for request in requests] == [[[{"role": "user", "content": text}]] for text in "ab"]
    assert [request.labels for request in requests] == [["x", "y"]] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "input: give a text, or a list of 1 to 16 texts"),
        (["x"] * 17, "input: give a text, or a list of 1 to 16 texts"),
        (5, "input: give a text, or a list of 1 to 16 texts"),
        (["x", " "], "input: text 2 is empty; leave it out"),
        ("", "input: text 1 is empty; leave it out"),
    ],
)
def test_what_cannot_be_classified_is_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        read_request(ClassifyRequest, {"model": "m", "input": given})
    assert (raised.value.status, raised.value.param, str(raised.value)) == (400, "input", message)


def test_what_is_null_or_unknown_is_left_out() -> None:
    asked = read_request(ChatRequest, {**CHAT, "stop": None, "temperature": None, "user": "me", "logit_bias": {}})
    assert (asked.stop, asked.temperature, asked.n, asked.top) == ([], 1.0, 1, None)
    assert read_request(ChatRequest, {**CHAT, "stop": "a", "temperature": 1, "top_p": 1}).stop == ["a"]
    assert read_request(ChatRequest, {**CHAT, "max_tokens": 4, "max_completion_tokens": 5}).max_tokens == 5
    assert read_request(ChatRequest, {**CHAT, "logprobs": True}).top == 0
    assert read_request(ChatRequest, {**CHAT, "min_tokens": 0, "add_generation_prompt": True, "service_tier": "auto"})
    assert read_request(ChatRequest, {**CHAT, "structured_outputs": {"choice": ["a"]}}).labels == ["a"]
    with pytest.raises(ApiError, match="chat_template_kwargs is not supported here"):
        read_request(CompletionRequest, {**TEXT, "chat_template_kwargs": {}})


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    asked = read_request(ChatRequest, {**CHAT, "messages": messages})
    assert asked.prompts == [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": ""}]]


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]
)
def test_prompts_are_text_or_tokens_one_or_several(prompt: Any, prompts: Any) -> None:
    assert read_request(CompletionRequest, {**TEXT, "prompt": prompt}).prompts == prompts


# fmt: off
UNSUPPORTED = {
    "tools": [{}], "frequency_penalty": 0.5, "min_tokens": 3, "ignore_eos": True, "stop_token_ids": [5],
    "bad_words": ["x"], "logits_processors": ["x"], "truncate_prompt_tokens": 5, "prompt_logprobs": 1,
    "add_generation_prompt": False, "guided_regex": "x", "temprature": 0,
}
# fmt: on


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        *(({**CHAT, name: value}, name, "not supported here") for name, value in UNSUPPORTED.items()),
        ({"messages": CHAT["messages"]}, "model", "Field required"),
        ({**CHAT, "messages": []}, "messages", "at least 1 item"),
        ({**CHAT, "messages": [{"content": "?"}]}, "messages.0.role", "Field required"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "'text'"),
        ({**CHAT, "n": 0}, "n", "greater than or equal to 1"),
        ({**CHAT, "n": 1000}, "n", "less than or equal to 16"),
        ({**CHAT, "n": "2"}, "n", "valid integer"),
        ({**CHAT, "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({**CHAT, "temperature": float("nan")}, "temperature", "temperature"),
        ({**CHAT, "top_p": 0}, "top_p", "greater than 0"),
        ({**CHAT, "stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({**CHAT, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({**CHAT, "top_logprobs": 3}, None, "top_logprobs needs logprobs: true"),
        ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        (
            {**CHAT, "response_format": {"type": "json_object"}},
            "response_format",
            "response_format: json_object is not supported here; give a json_schema",
        ),
        (
            {**CHAT, "response_format": {}},
            "response_format",
            "without a type is not supported here; give a json_schema",
        ),
        (
            schema({"a": {"type": "string"}}),
            "response_format.json_schema.json_schema.schema",
            "the field a needs an enum",
        ),
        (schema({}), "response_format.json_schema.json_schema.schema", "no object with properties"),
        ({**schema({"a": {"enum": [1]}}), "n": 2}, None, "one answer, without logprobs"),
        ({**CHAT, "messages": [{"role": "boss", "content": "?"}]}, "messages.0.role", "'system'"),
        ({**CHAT, "structured_outputs": {"regex": "x"}}, "structured_outputs.choice", "Field required"),
        ({**CHAT, "structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
        ({**CHAT, "guided_choice": ["a", "b"], "logprobs": True}, None, "logprobs are of tokens"),
        ([], None, "not a JSON object"),
    ],
)
def test_a_wrong_chat_is_refused(body: Any, param: str | None, message: str) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        read_request(ChatRequest, body)
    error = raised.value.document()["error"]
    assert (raised.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param is None or param in error["message"]


@pytest.mark.parametrize("prompt", [5, [], [[]], ["a", 1], [-1], [True], {}, [["a"]]])
def test_a_wrong_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt: text, token ids, or a list of either") as raised:
        read_request(CompletionRequest, {**TEXT, "prompt": prompt})
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_chat_adds_up_to_the_whole(n: int, include_usage: bool) -> None:
    body = {**CHAT, "n": n, "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": include_usage}}
    request = read_request(ChatRequest, body)
    deltas = [AnswerDelta(k, "é", (TOKEN,), generated=1) for k in range(n)]
    deltas += [AnswerDelta(k, "", (), "stop", {**IVON, "members": k}, 1) for k in reversed(range(n))]
    used = usage(3, 2 * n)
    whole = Writer(request, n).whole(deltas, used)
    writer = Writer(request, n)
    chunks = [chunk for delta in deltas for chunk in writer.chunks(delta)] + list(writer.end(used))

    ivon = [{**IVON, "members": index, "tokens": [TOKEN.certainty()]} for index in range(n)]
    read, parsed = ChatCompletion.model_validate(whole), [ChatCompletionChunk.model_validate(c) for c in chunks]
    for choice in read.choices:
        own = [c.choices[0] for c in parsed if c.choices and c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content == "é"
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["stop"]
        assert choice.logprobs
        assert choice.logprobs.content
        assert [t for c in own if c.logprobs for t in c.logprobs.content or []] == choice.logprobs.content
        assert [(t.token, t.bytes) for t in choice.logprobs.content[0].top_logprobs] == [("é", [195, 169]), ("�", None)]
        assert n == 1 or own[-1].model_extra == choice.model_extra == {"ivon": ivon[choice.index]}
    assert len({c.id for c in parsed}) == 1
    assert whole["ivon"] == chunks[-1]["ivon"] == ivon[0]
    assert all("ivon" not in chunk for chunk in chunks[:-1])
    assert chunks[1]["choices"][0]["ivon"]["tokens"][0]["token"] == "é"  # tokens as they come
    assert (chunks[-1]["choices"] == []) == include_usage
    usages = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    assert usages == ([None] * (len(chunks) - 1) + [used] if include_usage else [])


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_nothing_is_told_of_tokens_that_nobody_asked_for(kind: Any) -> None:
    request = read_request(kind, CHAT if kind is ChatRequest else TEXT)
    deltas = [AnswerDelta(0, "é", (TOKEN,)), AnswerDelta(0, "", (TOKEN,), "stop", IVON)]
    whole = Writer(request, 1).whole(deltas, {})
    writer = Writer(request, 1)
    for document in (whole, *(chunk for delta in deltas for chunk in writer.chunks(delta))):
        assert document.get("ivon") in (None, IVON)
        assert document["choices"][0]["logprobs"] is None
        assert "ivon" not in document["choices"][0]
    assert whole["ivon"] == IVON


def test_a_completion_tells_tokens_in_its_own_way() -> None:
    request = read_request(CompletionRequest, {**TEXT, "logprobs": 1})
    two = (TOKEN, TOKEN._replace(id=8, name="b", text="b", logprob=-2.0))
    writer = Writer(request, 1)
    chunks = [*writer.chunks(AnswerDelta(0, "éb", two)), *writer.chunks(AnswerDelta(0, "é", (TOKEN,), "length", IVON))]
    first, second = (
        Completion.model_validate({**c, "choices": [{**c["choices"][0], "finish_reason": "stop"}]}).choices[0]
        for c in chunks
    )
    assert first.text + second.text == "ébé"
    assert first.logprobs
    assert second.logprobs
    assert (first.logprobs.tokens, first.logprobs.token_logprobs) == (["é", "b"], [-0.5, -2.0])
    assert first.logprobs.text_offset == [0, 1]
    assert second.logprobs.text_offset == [2]
    assert first.logprobs.top_logprobs == [{"é": -0.5, "�": -1.5}, {"é": -0.5, "�": -1.5, "b": -2.0}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[0]["choices"][0]["ivon"]["tokens"][1]["token"] == "b"


def test_the_field_ivon_is_that_of_the_tokens() -> None:
    first = Token(0, "a", "a", math.log(0.9), (), 0.2, 0.1)
    tokens = [first, Token(1, "b", "b", math.log(0.4), (), 0.4, 0.3)]
    expected = {"confidence": math.sqrt(0.36), "expected_entropy": 0.3, "mutual_information": 0.2, "members": 8}
    assert certainty_of(tokens, 8) == pytest.approx(expected)
    assert [certainty_of(tokens, 8, t)["abstain"] for t in (0.59, 0.6, 0.61)] == [False, False, True]
    entropies = {"expected_entropy": 0.2, "mutual_information": 0.1}
    assert first.certainty() == {"token": "a", "probability": pytest.approx(0.9), **entropies}
