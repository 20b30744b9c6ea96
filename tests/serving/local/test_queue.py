"""The queue in front of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from slow_engine import LetterReader, SlowEngine

from axolotl_ivon import IVONError
from axolotl_ivon.serving.api.answers import AnswerDelta
from axolotl_ivon.serving.api.backend import Limits
from axolotl_ivon.serving.api.protocol import ApiError, ChatRequest, CompletionRequest, read_request
from axolotl_ivon.serving.local.queue import Local


def request(**fields: Any) -> CompletionRequest:
    return read_request(CompletionRequest, {"model": "slow", "prompt": "abc", **fields})


def chat(messages: int = 1) -> ChatRequest:
    return read_request(ChatRequest, {"model": "slow", "messages": messages * [{"role": "user", "content": "?"}]})


def run(test: Callable[[Local], Awaitable[None]], engine: Any, limits: Limits) -> None:
    """Run a test with a queue in front of an engine."""

    async def all_of_it() -> None:
        backend = Local(engine, LetterReader(), limits)
        await test(backend)
        await backend.close()

    asyncio.run(all_of_it())


async def deltas(backend: Local, asked: Any) -> list[AnswerDelta]:
    return [delta async for delta in (await backend.answer(asked)).deltas]


def test_a_request_is_one_for_each_prompt() -> None:
    engine = SlowEngine(1000)
    fields = {"max_tokens": 2, "seed": 5, "temperature": 0.5, "top_p": 0.9, "stop": "x", "logprobs": 3}

    async def test(backend: Local) -> None:
        for asked, answers in ((request(prompt=["ab", "c"], **fields), 2), (request(), 1), (chat(2), 1)):
            assert {delta.number for delta in await deltas(backend, asked)} == set(range(answers))

    run(test, engine, Limits(max_tokens=100))
    first, second, third, fourth = engine.begun
    assert [own.ids for own in engine.begun] == [(1, 1), (1,), (1, 1, 1), (7, 7)]
    assert (first.max_tokens, third.max_tokens, fourth.max_tokens) == (2, 16, 100)
    assert (first.temperature, first.top_p, first.stop, first.top) == (0.5, 0.9, ("x",), 3)
    assert (first.seed, second.seed) == (5, 6)
    assert third.seed != fourth.seed  # nobody gave one


def test_a_text_has_16_tokens_or_the_limit_if_that_is_less() -> None:
    engine = SlowEngine(1000)

    async def test(backend: Local) -> None:
        await deltas(backend, request())

    run(test, engine, Limits(max_tokens=5))
    assert engine.begun[0].max_tokens == 5


def test_a_chat_gets_the_room_that_there_is() -> None:
    engine = SlowEngine(1000)
    engine.max_length = 10

    async def test(backend: Local) -> None:
        assert len(await deltas(backend, chat(7))) == 3
        for asked in (request(prompt="a" * 9, max_tokens=2), request(prompt="a" * 10, max_tokens=1)):
            with pytest.raises(ApiError, match="the model takes 10 together") as raised:
                await backend.answer(asked)
            assert raised.value.code == "context_length_exceeded"

    run(test, engine, Limits())


def test_what_the_encoder_refuses_is_the_requests_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[int]:
        raise IVONError("messages: the chat template refuses the messages (roles)")

    monkeypatch.setattr(LetterReader, "encode", refuse)

    async def test(backend: Local) -> None:
        for asked, param in ((chat(), "messages"), (request(), "prompt")):
            with pytest.raises(ApiError, match="the chat template refuses") as raised:
                await backend.answer(asked)
            assert (raised.value.status, raised.value.param) == (400, param)

    run(test, SlowEngine(), Limits())


def test_the_request_after_one_that_ran_out_of_memory_is_answered() -> None:
    engine = SlowEngine(100)
    engine.failing = RuntimeError("DefaultCPUAllocator: can't allocate memory")

    async def test(backend: Local) -> None:
        with pytest.raises(ApiError, match="out of memory; ask for a shorter prompt") as raised:
            await deltas(backend, request())
        assert raised.value.status == 503
        engine.failing = None
        assert len(await deltas(backend, request())) == 16

    run(test, engine, Limits())


def test_a_queue_of_none_takes_one_at_a_time() -> None:
    engine = SlowEngine()

    async def test(backend: Local) -> None:
        first = asyncio.create_task(deltas(backend, request(max_tokens=1)))
        while not backend.gauges()["running"]:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="0 requests are waiting already"):
            await backend.answer(request())
        engine.go.release()
        assert len(await first) == 1

    run(test, engine, Limits(max_queue=0))
