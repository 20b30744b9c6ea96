"""The server through the official client, over a real socket: answers, refusals, and clients that go away."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from brute_force import label_probabilities
from peft import PeftModel, set_peft_model_state_dict
from prometheus_client.parser import text_string_to_metric_families
from served import ask, completion, connect, official, until
from slow_engine import SlowEngine
from transformers import AutoModelForCausalLM

from axolotl_ivon import Posterior, predict
from axolotl_ivon.data.encode import common_length
from axolotl_ivon.serving.api.app import Guard
from axolotl_ivon.serving.api.monitoring import Metrics
from axolotl_ivon.serving.local.engine import GenerationRequest, TokenEngine

MESSAGES: Any = [{"role": "user", "content": "red dog"}]
SLOW: Any = {"model": "slow", "prompt": "x"}
Serve = Callable[..., Any]


@pytest.mark.parametrize("model", ["tiny", "tiny:mean", "tiny:posterior", "tiny:member-0001"])
@pytest.mark.parametrize("n", [1, 3])
def test_streaming_a_chat_equals_not_streaming(client: openai.OpenAI, model: str, n: int) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "n": n, "max_tokens": 12, "seed": 7, "stop": ["q", "zz"]}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == choice.finish_reason
        assert choice.logprobs
        tokens = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
        assert tokens == choice.logprobs.content
    ivon: Any = whole.model_extra
    assert chunks[-1].model_extra["ivon"] == ivon["ivon"]  # type: ignore[index]
    assert ivon["ivon"]["members"] == (3 if model in ("tiny", "tiny:posterior") else 1)


def test_the_answer_is_the_engines(client: openai.OpenAI, engine: TokenEngine, tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    request = GenerationRequest("tiny", ids, max_tokens=8, temperature=0.0)
    expected = [delta for step in engine.deltas(request) for delta in step]
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == "".join(delta.text for delta in expected)
    assert found.model_extra == {"ivon": pytest.approx(expected[-1].ivon)}
    assert found.usage
    assert found.usage.prompt_tokens == len(ids)
    by_ids = client.completions.create(model="tiny", prompt=list(ids), max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == found.choices[0].message.content


LABELS = ["yes no", "A", "yes"]


def test_an_answer_is_one_of_the_choices(client: openai.OpenAI, url: str, tiny_adapter: Path, tokenizer: Any) -> None:
    q = Posterior.from_pretrained(tiny_adapter).temper(0.002)  # as the engine's
    expected, other = predict(q, ["red dog", "moon"], LABELS, n=3)
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    for extra in ({"structured_outputs": {"choice": LABELS}}, {"guided_choice": LABELS}):
        answer = client.chat.completions.create(**asked, extra_body=extra)
        ivon: Any = (answer.model_extra or {})["ivon"]
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected.label, "stop")
        assert ivon.pop("choices") == pytest.approx(expected.probabilities, rel=1e-4)
        figures = {name: getattr(expected, name) for name in ("confidence", "expected_entropy", "mutual_information")}
        assert ivon == pytest.approx({**figures, "members": 3}, rel=1e-3)
        chunks = list(client.chat.completions.create(**asked, extra_body=extra, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.label
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    extra_body = {"guided_choice": LABELS}
    completed = client.completions.create(model="tiny", prompt=text, temperature=0, extra_body=extra_body)
    assert completed.model_extra["ivon"]["choices"] == pytest.approx(expected.probabilities, rel=1e-4)  # type: ignore[index]
    few: Any = {"messages": MESSAGES, "n": 16, "seed": 3, "extra_body": {"guided_choice": ["A", "B", "C"]}}
    drawn = [client.chat.completions.create(model="tiny", **few) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1  # at temperature 1 they are drawn
    assert set(texts[0]) <= {"A", "B", "C"}
    status, _, document = ask(url, "/classify", {"model": "tiny", "input": ["red dog", "moon"], "choices": LABELS})
    assert (status, document["object"], document["model"]) == (200, "list", "tiny")
    for number, (row, decision) in enumerate(zip(document["data"], (expected, other), strict=True)):
        assert (row["index"], row["label"], row["num_classes"]) == (number, decision.label, 3)
        assert row["probs"] == pytest.approx(list(decision.probabilities.values()), rel=1e-4)
        assert row["labels"] == LABELS


def test_every_field_of_a_schema_is_a_choice_given_those_before(
    client: openai.OpenAI, tiny_adapter: Path, tiny_llama: Path, tokenizer: Any
) -> None:
    schema = {"type": "object", "properties": {"of": {"enum": ["sun", "sun moon"]}, "at": {"enum": [1, 12, 5]}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: Any = {"model": "tiny", "messages": MESSAGES, "response_format": form}
    answer = client.chat.completions.create(**asked, temperature=0)
    text, ivon = answer.choices[0].message.content or "", (answer.model_extra or {})["ivon"]
    first, second = ivon["choices"]["of"], ivon["choices"]["at"]
    assert json.loads(text) == {"of": first["value"], "at": second["value"]}
    assert ivon["confidence"] == pytest.approx(first["probability"] * second["probability"])
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_adapter).eval()
    q = Posterior.from_pretrained(tiny_adapter).temper(0.002)  # as the engine's
    for begun, field, end in (('{"of": ', first, ","), (f'{{"of": {json.dumps(first["value"])}, "at": ', second, "}")):
        rows = [tokenizer(begun + value + end)["input_ids"] for value in field["probabilities"]]
        start = common_length(rows)
        drawn = []
        for member in range(3):
            set_peft_model_state_dict(model, q.sample(0, member))
            drawn.append(label_probabilities(model, [*prompt, *rows[0][:start]], [row[start:] for row in rows]))
        expected = torch.stack(drawn).mean(0).tolist()
        assert list(field["probabilities"].values()) == pytest.approx(expected, rel=1e-3)
        assert field["probability"] == max(field["probabilities"].values())
    texts = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in range(12)]
    assert len({*texts}) > 1  # at temperature 1 values are drawn
    streamed = client.chat.completions.create(**asked, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"guided_choice": ["A"]}, "choices A: give at least two different"),
        ({"guided_choice": ["A", " A"]}, "give at least two different, non-empty strings"),
        ({"structured_outputs": {"json": {}}}, "Field required"),
    ],
)
def test_choices_that_cannot_be_are_one_line(client: openai.OpenAI, extra: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra)
    assert str(raised.value.param).startswith("structured_outputs")


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    names = ["tiny", "tiny:mean", "tiny:posterior", "tiny:member-0000", "tiny:member-0001", "tiny:member-0002"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("tiny:mean").id == "tiny:mean"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_concurrent_clients_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    def one(seed: int) -> str:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": seed, "stream": seed % 2 == 1}
        answer = client.chat.completions.create(**asked)
        if seed % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content or ""

    alone = [one(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == alone
    assert len(set(alone)) == 12


@pytest.mark.parametrize(
    ("asked", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 9999}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "red " * 700}]}, openai.BadRequestError, "messages"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, openai.BadRequestError, "messages"),
        ({"extra_body": {"chat_template_kwargs": 3}}, openai.BadRequestError, "chat_template_kwargs"),
    ],
)
def test_a_mistake_is_told_in_openais_shape(client: openai.OpenAI, asked: Any, kind: Any, param: str) -> None:
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **asked})
    assert raised.value.param == param
    assert set(raised.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/v1/chat/completions", b"{", {}, 400, "not valid JSON"),
        ("/v1/chat/completions", b"[" * 200_000, {}, 400, "not valid JSON"),
        ("/v1/chat/completions", b"[]", {}, 400, "not a JSON object"),
        ("/v1/chat/completions", b"\xff", {}, 400, "not valid JSON"),
        ("/v1/completions", b'{"model": "tiny", "prompt": ""}', {}, 400, "the prompt is empty"),
        ("/v1/completions", b'{"model": "tiny", "prompt": [99999]}', {}, 400, "token 99999"),
        ("/v1/completions", b'{"model": "\\uD800", "prompt": "x"}', {}, 400, "not valid JSON"),
        ("/v1/completions", b'{"model": "\\ud83d\\ude42", "prompt": "x"}', {}, 404, "is not served here"),
        ("/v1/chat/completions", b"{}", {"Content_Type": "text/plain"}, 415, "send JSON"),
        ("/v1/chat/completions", None, {}, 405, "Method Not Allowed"),
        ("/v2", None, {}, 404, "Not Found"),
        ("/classify", b'{"model": "tiny", "input": "x"}', {}, 400, "training data had; send choices"),
        ("/classify", b'{"model": "no", "input": "x"}', {}, 404, "is not served here"),
        ("/classify", b'{"model": "tiny", "input": "x", "dimensions": 3}', {}, 400, "dimensions is not supported here"),
        ("/../../etc/passwd", None, {}, 404, "Not Found"),
        ("/v1/models", None, {"Host": "evil.example"}, 403, "answers under localhost"),
        ("/v1/models", None, {"Host": "127.0.0.1.evil.example:80"}, 403, "answers under localhost"),
    ],
)
def test_what_is_no_request(url: str, path: str, body: Any, headers: dict[str, str], status: int, message: str) -> None:
    answered, _, document = ask(url, path, body, **headers)
    assert answered == status
    assert message in document["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "param"), [({"choices": ["A", " A"]}, "choices"), ({"choices": LABELS, "input": "red " * 700}, "input")]
)
def test_a_mistake_in_a_classification_names_its_own_field(url: str, asked: dict[str, Any], param: str) -> None:
    status, _, document = ask(url, "/classify", {"model": "tiny", "input": "x", **asked})
    assert (status, document["error"]["param"]) == (400, param)


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "[::1]"])
def test_names_of_this_machine_are_taken(url: str, host: str) -> None:
    assert ask(url, "/v1/models", Host=host)[0] == 200


def test_a_key_is_asked_for_where_there_is_one(serve: Serve) -> None:
    with serve(guard=Guard(api_key="sécret")) as url:
        gets, posts = ("/v1/models", "/metrics"), ("/v1/chat/completions", "/v1/completions")
        for path, body in [*((path, None) for path in gets), *((path, {}) for path in posts)]:
            for headers in ({}, *({"Authorization": given} for given in ("Bearer no", "Basic s", "Bearer "))):
                status, answered, document = ask(url, path, body, **headers)
                assert status == 401
                assert document["error"].items() >= {"code": "invalid_api_key", "type": "authentication_error"}.items()
                assert answered["www-authenticate"] == "Bearer"
        assert ask(url, "/health")[0] == ask(url, "/")[0] == 200
    with serve(guard=Guard(api_key="secret")) as url:
        assert ask(url, "/v1/models", Authorization="Bearer secret", Host="elsewhere.example")[0] == 200
        assert official(url, "secret").models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            official(url, "secre").models.list()


def test_a_large_body_is_refused(serve: Serve) -> None:
    with serve(guard=Guard(max_body=1000)) as url:
        status, _, document = ask(url, "/v1/completions", {"model": "tiny", "prompt": "a" * 2000})
        assert (status, document["error"]["message"]) == (413, "the body has more than 1000 bytes, the most here")
        head = completion(b"", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        with connect(url, head + 2 * (b"200\r\n" + b"a" * 512 + b"\r\n")) as chunked:  # it doesn't say how large it is
            assert chunked.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    with serve(guard=Guard(body_timeout=0.2)) as url, connect(url, completion(b"{", 100)) as slow:
        answer = b""
        while more := slow.recv(1000):  # until it is closed
            answer += more
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not come within 0.2 s" in answer


def test_a_failure_inside_tells_nothing_outside(serve: Serve, slow: SlowEngine) -> None:
    slow.failing = ZeroDivisionError("at /some/where/secret.py")
    with serve(slow) as url, official(url) as client:
        slow.go.release(2)
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(**SLOW)
        assert raised.value.message == "Error code: 500 - something went wrong here; the log has it"
        assert raised.value.response.json()["error"]["type"] == "server_error"
        until(lambda: slow.ended)
        slow.failing = None
        stream = client.completions.create(**SLOW, stream=True)
        next(stream)
        slow.failing = ZeroDivisionError("at /some/where/secret.py")
        slow.go.release()
        with pytest.raises(openai.APIError, match="something went wrong here; the log has it"):
            list(stream)
        slow.failing = None
        slow.go.release(16)
        assert client.completions.create(**SLOW).choices[0].text == 16 * "x"


def test_a_full_queue_refuses(serve: Serve, slow: SlowEngine) -> None:
    with serve(slow, max_queue=1) as url, official(url) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.completions.create, **SLOW, max_tokens=3)
        until(lambda: slow.begun)
        second = pool.submit(client.completions.create, **SLOW, max_tokens=3)
        until(lambda: "ivon_waiting 1.0" in ask(url, "/metrics")[2])
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as raised:
            client.completions.create(**SLOW, max_tokens=3)
        assert raised.value.response.headers["retry-after"] == "1"
        assert (raised.value.code, raised.value.type) == ("queue_full", "rate_limit_error")
        slow.go.release(6)
        assert first.result().choices[0].text == second.result().choices[0].text == "xxx"


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_hangs_up_ends_its_work(serve: Serve, slow: SlowEngine, stream: str) -> None:
    body = b'{"model": "slow", "prompt": "x", "max_tokens": 400, "stream": %s}' % stream.encode()
    with serve(slow) as url:
        with connect(url, completion(body)) as hanging:
            until(lambda: slow.begun)
            slow.go.release(3)
            until(lambda: slow.steps == 3)
            hanging.shutdown(socket.SHUT_RDWR)
        # Written down at the end of a request.
        until(lambda: 'ivon_tokens_total{kind="generated"} 3.0' in ask(url, "/metrics")[2])
        slow.go.release()
        until(lambda: slow.ended)
        assert slow.steps <= 4  # it ends at the next token
        slow.go.release(2)
        with official(url) as other:
            assert other.completions.create(**SLOW, max_tokens=2).choices[0].text == "xx"
        assert 'status="499"' in ask(url, "/metrics")[2] or stream == "true"


def test_one_that_hangs_up_while_it_waits_is_forgotten(serve: Serve, slow: SlowEngine) -> None:
    with serve(slow) as url, official(url) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.completions.create, **SLOW, max_tokens=2)
        until(lambda: slow.begun)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**SLOW, max_tokens=9)
        until(lambda: "ivon_waiting 0.0" in ask(url, "/metrics")[2])
        slow.go.release(2)
        assert first.result().choices[0].text == "xx"
        assert len(slow.begun) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_a_request_is_limited(serve: Serve, slow: SlowEngine, stream: bool) -> None:
    with serve(slow, timeout=0.3) as url, official(url) as client:
        slow.go.release()
        with pytest.raises(openai.APIError, match=r"the answer took longer than 0\.3 s"):
            list(client.completions.create(**SLOW, stream=stream))
        slow.go.release()
        until(lambda: slow.ended)


def test_metrics_count(serve: Serve) -> None:
    with serve() as url, official(url) as client:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, seed=1, stop=["none of it"])
        ask(url, "/v1/completions", {"model": "no"})
        _, headers, text = ask(url, "/metrics")
    assert headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['ivon_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['ivon_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert lines['ivon_tokens_total{kind="generated"}'] == "5.0"
    assert lines['ivon_confidence_count{model="tiny"}'] == lines["ivon_first_token_seconds_count"] == "1.0"
    assert lines["ivon_running"] == "0.0"


def test_prometheus_reads_them() -> None:
    watched = {"waiting": 2.0}
    metrics = Metrics(lambda: watched)
    other = Metrics(dict)  # each server has its own
    metrics.tokens(3, 4)
    metrics.answer("a", {"confidence": 0.95, "mutual_information": 0.02, "abstain": True})
    metrics.answer("a", {"confidence": None, "mutual_information": None})
    for _ in range(1001):
        metrics.answer("b", {"confidence": 0.5})
    metrics.answer("b", {"confidence": 1.0})
    watched["waiting"] = 5.0
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert found["ivon_waiting",] == 5
    assert (found["ivon_tokens_total", "generated"], found["ivon_tokens_total", "prompt"]) == (4, 3)
    assert found["ivon_confidence_count", "a"] == found["ivon_abstained_total", "a"] == 1
    assert found["ivon_confidence_sum", "a"] == pytest.approx(0.95)
    assert found["ivon_confidence_recent", "b"] == pytest.approx((999 * 0.5 + 1) / 1000)
    assert found["ivon_mutual_information_bucket", "0.03", "a"] == 1
    assert found["ivon_mutual_information_bucket", "0.01", "a"] == 0
    assert b'kind="generated"' not in other.text()
