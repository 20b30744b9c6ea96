"""The server through the official client, over a real socket: what is asked, what is refused, and who goes away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from served import ask, connect
from slow_steps import SlowSteps

from axolotl_ivon.serving.api.app import Guard
from axolotl_ivon.serving.local.engine import Engine
from axolotl_ivon.serving.pieces import Ask

MESSAGES: Any = [{"role": "user", "content": "red dog"}]
Serve = Callable[..., Any]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def slow() -> SlowSteps:
    return SlowSteps()


def slow_client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


# --- what is asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "tiny:mean", "tiny:member-0001"])
@pytest.mark.parametrize("n", [1, 3])
def test_streaming_a_chat_equals_not_streaming(client: openai.OpenAI, model: str, n: int) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "n": n, "max_tokens": 12, "seed": 7, "stop": ["q", "zz"]}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    texts, reasons, tokens = [""] * n, [None] * n, [[] for _ in range(n)]  # type: ignore[var-annotated]
    chunks = list(client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
            tokens[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    for own, choice in zip(tokens, whole.choices, strict=True):
        assert choice.logprobs
        assert [t.model_dump() for t in own] == [t.model_dump() for t in choice.logprobs.content or []]
    assert chunks[-1].model_extra["ivon"] == whole.model_extra["ivon"]  # type: ignore[index]
    assert whole.model_extra["ivon"]["members"] == (3 if model == "tiny" else 1)  # type: ignore[index]


def test_streaming_completions_equals_not_streaming(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": ["red", "blue dog"], "n": 2, "max_tokens": 6, "seed": 1, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts: list[str] = [""] * 4
    offsets: list[list[int]] = [[] for _ in range(4)]
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset or [] if choice.logprobs else []
        last = chunk
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs]
    assert last.usage == whole.usage
    assert whole.usage
    assert whole.usage.completion_tokens >= 4
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_the_answer_is_the_engines(client: openai.OpenAI, engine: Engine, tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    expected = [piece for step in engine.pieces(Ask("tiny", ids, max_tokens=8, temperature=0.0)) for piece in step]
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == "".join(piece.text for piece in expected)
    assert found.model_extra == {"ivon": pytest.approx(expected[-1].ivon)}
    assert found.usage
    assert found.usage.prompt_tokens == len(ids)
    by_ids = client.completions.create(model="tiny", prompt=list(ids), max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == found.choices[0].message.content


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    names = ["tiny", "tiny:mean", "tiny:member-0000", "tiny:member-0001", "tiny:member-0002"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("tiny:mean").id == "tiny:mean"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_concurrent_clients_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    def one(seed: int) -> str:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": seed}
        if seed % 2:
            return "".join(
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
            )
        return client.chat.completions.create(**asked).choices[0].message.content or ""

    alone = [one(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == alone
    assert len(set(alone)) == 12


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other' is not served here"),
        ({"model": "../tiny"}, openai.NotFoundError, "not served"),
        ({"max_tokens": 9999}, openai.BadRequestError, "this server gives at most 64"),
        ({"messages": [{"role": "user", "content": "red " * 700}]}, openai.BadRequestError, "the model takes 512"),
        ({"n": 99}, openai.BadRequestError, "n: Input should be less than"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "tools is not supported",
        ),
    ],
)
def test_a_mistake_is_told_in_openais_shape(serve: Serve, asked: dict[str, Any], kind: Any, said: str) -> None:
    with serve(max_tokens=64) as url, slow_client(url) as client, pytest.raises(kind, match=said) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **asked})
    assert set(raised.value.body) == {"message", "type", "param", "code"}


def test_a_prompt_without_tokens_and_unknown_tokens_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="there is nothing to go on from"):
        client.completions.create(model="tiny", prompt="")
    with pytest.raises(openai.BadRequestError, match="token 99999"):
        client.completions.create(model="tiny", prompt=[99999])


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "said"),
    [
        ("/v1/chat/completions", b"{", {}, 400, "not valid JSON"),
        ("/v1/chat/completions", b"[" * 200_000, {}, 400, "not valid JSON"),
        ("/v1/chat/completions", b"[]", {}, 400, "not a JSON object"),
        ("/v1/chat/completions", b"\xff", {}, 400, "not valid JSON"),
        ("/v1/completions", b'{"model": "\\uD800", "prompt": "x"}', {}, 400, "not valid JSON"),
        ("/v1/completions", b'{"model": "\\ud83d\\ude42", "prompt": "x"}', {}, 404, "is not served here"),
        ("/v1/chat/completions", b"{}", {"Content_Type": "text/plain"}, 415, "send JSON"),
        ("/v1/chat/completions", None, {}, 405, "Method Not Allowed"),
        ("/v2", None, {}, 404, "Not Found"),
        ("/../../etc/passwd", None, {}, 404, "Not Found"),
        ("/v1/models", None, {"Host": "evil.example"}, 403, "answers under localhost"),
        ("/v1/models", None, {"Host": "127.0.0.1.evil.example:80"}, 403, "answers under localhost"),
    ],
)
def test_what_is_no_request_is_refused(
    url: str, path: str, body: Any, headers: dict[str, str], status: int, said: str
) -> None:
    found = ask(url, path, body, **headers)
    assert (found[0], found[2]["error"]["message"]) == (status, found[2]["error"]["message"])
    assert said in found[2]["error"]["message"]


def test_names_of_this_machine_are_taken(url: str) -> None:
    for host in ("localhost:1", "LOCALHOST", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "[::1]"):
        assert ask(url, "/v1/models", Host=host)[0] == 200


def test_a_key_is_asked_for_where_there_is_one(serve: Serve) -> None:
    with serve(guard=Guard(api_key="sécret")) as url:
        for path, body in (
            ("/v1/models", None),
            ("/metrics", None),
            ("/v1/chat/completions", {}),
            ("/v1/completions", {}),
        ):
            for given in (
                {},
                {"Authorization": "Bearer no"},
                {"Authorization": "Basic s"},
                {"Authorization": "Bearer "},
            ):
                status, headers, told = ask(url, path, body, **given)
                assert (status, told["error"]["code"], headers["www-authenticate"]) == (
                    401,
                    "invalid_api_key",
                    "Bearer",
                )
        assert ask(url, "/health")[0] == ask(url, "/")[0] == 200
    with serve(guard=Guard(api_key="secret")) as url:
        assert ask(url, "/v1/models", Authorization="Bearer secret", Host="elsewhere.example")[0] == 200
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="secret").models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="secre").models.list()


def test_a_large_body_is_refused(serve: Serve) -> None:
    with serve(guard=Guard(max_body=1000)) as url:
        status, _, told = ask(url, "/v1/completions", {"model": "tiny", "prompt": "a" * 2000})
        assert (status, told["error"]["message"]) == (413, "the body has more than 1000 bytes, the most here")
        with connect(url) as chunked:  # without saying how large it is
            chunked.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n200\r\n" + b"a" * 512 + b"\r\n"
            )
            assert chunked.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    with serve(guard=Guard(body_timeout=0.2)) as url, connect(url) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = b""
        while more := slow.recv(1000):  # until it is closed
            answer += more
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not come within 0.2 s" in answer


def test_a_failure_inside_tells_nothing_outside(serve: Serve, slow: SlowSteps) -> None:
    slow.failing = ZeroDivisionError("at /home/me/secret.py")
    with serve(slow) as url, slow_client(url) as client:
        slow.go.release(2)
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="slow", prompt="x")
        assert raised.value.message == "Error code: 500 - something went wrong here; the log has it"
        assert raised.value.response.json()["error"]["type"] == "server_error"
        slow.failing = None
        stream = client.completions.create(model="slow", prompt="x", stream=True)
        next(stream)
        slow.failing = ZeroDivisionError("at /home/me/secret.py")
        slow.go.release()
        with pytest.raises(openai.APIError, match="something went wrong here; the log has it"):
            list(stream)
        slow.failing = None
        slow.go.release(16)
        assert client.completions.create(model="slow", prompt="x").choices[0].text == 16 * "x"


# --- the queue, and who goes away ----------------------------------------------------------------------------------


def test_a_full_queue_refuses(serve: Serve, slow: SlowSteps) -> None:
    with serve(slow, max_queue=1) as url, slow_client(url) as client, ThreadPoolExecutor(2) as pool:
        asked: Any = {"model": "slow", "prompt": "x", "max_tokens": 3}
        first = pool.submit(client.completions.create, **asked)
        until(lambda: slow.begun)
        second = pool.submit(client.completions.create, **asked)
        until(lambda: "ivon_waiting 1.0" in ask(url, "/metrics")[2])
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as raised:
            client.completions.create(**asked)
        assert raised.value.response.headers["retry-after"] == "1"
        assert raised.value.code == "queue_full"
        slow.go.release(6)
        assert first.result().choices[0].text == second.result().choices[0].text == "xxx"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_work(serve: Serve, slow: SlowSteps, stream: bool) -> None:
    with serve(slow) as url:
        body = json.dumps({"model": "slow", "prompt": "x", "max_tokens": 400, "stream": stream}).encode()
        with connect(url) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            until(lambda: slow.begun)
            slow.go.release(3)
            until(lambda: slow.steps == 3)
            client.shutdown(socket.SHUT_RDWR)
        until(
            lambda: 'ivon_tokens_total{kind="generated"} 3.0' in ask(url, "/metrics")[2]
        )  # written down at the end of a request
        slow.go.release()
        until(lambda: slow.ended)
        assert slow.steps <= 4  # it ends at the next token
        slow.go.release(2)
        with slow_client(url) as other:
            assert other.completions.create(model="slow", prompt="x", max_tokens=2).choices[0].text == "xx"
        assert 'status="499"' in ask(url, "/metrics")[2] or stream


def test_one_that_hangs_up_while_it_waits_is_forgotten(serve: Serve, slow: SlowSteps) -> None:
    with serve(slow) as url, slow_client(url) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.completions.create, model="slow", prompt="x", max_tokens=2)
        until(lambda: slow.begun)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(model="slow", prompt="y", max_tokens=9)
        until(lambda: "ivon_waiting 0.0" in ask(url, "/metrics")[2])
        slow.go.release(2)
        assert first.result().choices[0].text == "xx"
        assert len(slow.begun) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_a_request_is_limited(serve: Serve, slow: SlowSteps, stream: bool) -> None:
    with serve(slow, timeout=0.3) as url, slow_client(url) as client:
        slow.go.release()
        with pytest.raises(openai.APIError, match=r"the answer took longer than 0\.3 s"):
            found = client.completions.create(model="slow", prompt="x", stream=stream)
            assert [chunk.choices[0].text for chunk in found] == []
        slow.go.release()
        until(lambda: slow.ended)


def test_a_server_that_ends_finishes_what_runs(serve: Serve, slow: SlowSteps) -> None:
    with ThreadPoolExecutor(2) as pool:
        with serve(slow) as url:
            client = slow_client(url)
            running = [pool.submit(client.completions.create, model="slow", prompt="x", max_tokens=3) for _ in range(2)]
            until(lambda: slow.begun)
            until(lambda: "ivon_waiting 1.0" in ask(url, "/metrics")[2])
            threading.Timer(0.3, slow.go.release, [6]).start()
        assert [own.result().choices[0].text for own in running] == ["xxx", "xxx"]
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(model="slow", prompt="x")


def test_metrics_count(serve: Serve) -> None:
    with serve() as url, slow_client(url) as client:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, seed=1, stop=["none of it"])
        ask(url, "/v1/completions", {"model": "no"})
        kind, text = ask(url, "/metrics")[1]["content-type"], ask(url, "/metrics")[2]
    assert kind.startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['ivon_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['ivon_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert lines['ivon_tokens_total{kind="generated"}'] == "5.0"
    assert lines["ivon_confidence_count"] == lines["ivon_first_token_seconds_count"] == "1.0"
    assert lines["ivon_running"] == "0.0"
