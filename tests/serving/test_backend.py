"""The queue in front of the model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from slow_steps import SlowSteps

from axolotl_ivon import IVONError
from axolotl_ivon.serving.api.protocol import ChatRequest, CompletionRequest, Refusal, read_request
from axolotl_ivon.serving.backend import Limits, Local


def request(**asked: Any) -> CompletionRequest:
    return read_request(CompletionRequest, {"model": "slow", "prompt": "abc", **asked})


def local(steps: SlowSteps, **options: Any) -> Local:
    memory = options.pop("out_of_memory", lambda error: False)
    return Local(steps, lambda messages: [7] * len(messages), lambda text: [1] * len(text), Limits(**options), memory)


def test_requests_become_asks() -> None:
    steps = SlowSteps(1000)

    async def run() -> Any:
        backend = local(steps, max_tokens=100)
        for asked in (
            request(prompt=["ab", "c"], max_tokens=2, seed=5, temperature=0.5, top_p=0.9, stop="x", logprobs=3),
            request(),
            read_request(ChatRequest, {"model": "slow", "messages": 2 * [{"role": "user", "content": "?"}]}),
        ):
            answers = await backend.answer(asked)
            pieces = [piece async for piece in answers.pieces]
            assert {piece.number for piece in pieces} == set(range(answers.choices))
        await backend.close()

    asyncio.run(run())
    first, second, third, fourth = steps.begun
    assert (first.ids, second.ids, third.ids, fourth.ids) == ((1, 1), (1,), (1, 1, 1), (7, 7))
    assert (first.max_tokens, third.max_tokens, fourth.max_tokens) == (2, 16, 100)
    assert (first.temperature, first.top_p, first.stop, first.top) == (0.5, 0.9, ("x",), 3)
    assert first.seed == 5
    assert second.seed != first.seed
    assert third.seed != fourth.seed  # nobody gave one


def test_a_chat_gets_the_room_that_there_is() -> None:
    steps = SlowSteps(1000)
    steps.longest = 10

    async def run() -> None:
        backend = local(steps)
        chat = read_request(ChatRequest, {"model": "slow", "messages": 7 * [{"role": "user", "content": "?"}]})
        assert len([piece async for piece in (await backend.answer(chat)).pieces]) == 3
        for asked in (request(prompt="a" * 9, max_tokens=2), request(prompt="a" * 10, max_tokens=1)):
            with pytest.raises(Refusal, match="the model takes 10 together") as raised:
                await backend.answer(asked)
            assert raised.value.code == "context_length_exceeded"
        await backend.close()

    asyncio.run(run())


def test_what_the_encoder_refuses_is_the_requests_fault() -> None:
    def refuse(_: Any) -> list[int]:
        raise IVONError("messages: the chat template refuses the messages (roles)")

    async def run() -> None:
        backend = Local(SlowSteps(), refuse, refuse, Limits())
        chat = read_request(ChatRequest, {"model": "slow", "messages": [{"role": "user", "content": "?"}]})
        for asked, param in ((chat, "messages"), (request(), "prompt")):
            with pytest.raises(Refusal, match="the chat template refuses") as raised:
                await backend.answer(asked)
            assert (raised.value.status, raised.value.param) == (400, param)
        await backend.close()

    asyncio.run(run())


def test_memory_that_runs_out_is_told_and_the_next_request_is_answered() -> None:
    steps = SlowSteps(100)

    async def run() -> None:
        backend = local(steps, out_of_memory=lambda error: isinstance(error, MemoryError))
        steps.failing = MemoryError()
        with pytest.raises(Refusal, match="out of memory; ask for a shorter prompt"):
            [piece async for piece in (await backend.answer(request())).pieces]
        steps.failing = None
        assert len([piece async for piece in (await backend.answer(request())).pieces]) == 16
        await backend.close()

    asyncio.run(run())


def test_a_queue_of_none_takes_one_at_a_time() -> None:
    steps = SlowSteps()

    async def run() -> None:
        backend = local(steps, max_queue=0)
        answers = await backend.answer(request(max_tokens=1))
        while not backend.gauges()["running"]:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="0 requests are waiting already"):
            await backend.answer(request())
        steps.go.release()
        assert len([piece async for piece in answers.pieces]) == 1
        await backend.close()

    asyncio.run(run())
