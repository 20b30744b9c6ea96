"""Answers from a model in memory, one request after the other, in a thread of the model's own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ...errors import IVONError
from ..api.answers import AnswerDelta
from ..api.backend import AnswerStream, Backend, Limits, queue_full
from ..api.protocol import ApiError, Request
from .request import GenerationRequest, generation_requests

if TYPE_CHECKING:
    from .engine import TokenEngine


class Local(Backend):
    """Answers from an engine in memory.

    Args:
        encode: returns the tokens of a prompt: a text, token ids or the messages of a chat. It is called from one
            thread at a time, but never from the engine's.
        out_of_memory: whether an exception means that the memory ran out; frees what can be freed.
    """

    def __init__(
        self,
        engine: TokenEngine,
        encode: Callable[[Any], Sequence[int]],
        limits: Limits,
        out_of_memory: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self._engine, self._encode, self._limits = engine, encode, limits
        self._out_of_memory = out_of_memory
        self._encoding, self._turn = asyncio.Lock(), asyncio.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "ivon-serve")

    @property
    def models(self) -> Collection[str]:
        return self._engine.models

    def gauges(self) -> Mapping[str, float]:
        return {"waiting": self._waiting, "running": float(self._turn.locked())}

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, request: Request) -> AnswerStream:
        self._limits.check(request)
        self._check_queue()
        async with self._encoding:
            prompts = await asyncio.to_thread(self._encoded, request)
        parts = generation_requests(request, prompts, self._limits.max_tokens, self._engine.max_length)
        deltas = self._in_time(self._deltas(parts))
        return AnswerStream(sum(map(len, prompts)), len(parts) * request.n, deltas)

    def _check_queue(self) -> None:
        if self._waiting >= self._limits.max_queue and self._turn.locked():
            raise queue_full(f"{self._waiting} requests are waiting")

    def _encoded(self, request: Request) -> list[tuple[int, ...]]:
        try:
            prompts = [tuple(self._encode(prompt)) for prompt in request.prompts]
            for ids in prompts:
                if not ids:
                    raise IVONError("the prompt is empty")
                self._engine.check(ids)
        except IVONError as error:
            raise ApiError(400, str(error), param=request.prompt_field) from None
        return prompts

    async def _in_time(self, deltas: AsyncGenerator[AnswerDelta, None]) -> AsyncGenerator[AnswerDelta, None]:
        """Yield `deltas` as long as the request has time."""
        deadline = time.monotonic() + self._limits.timeout
        async with contextlib.aclosing(deltas):
            while True:
                try:
                    yield await asyncio.wait_for(anext(deltas), max(0.0, deadline - time.monotonic()))
                except StopAsyncIteration:
                    return
                except asyncio.TimeoutError:
                    message = f"the answer took longer than {self._limits.timeout:g} s"
                    raise ApiError(504, message, code="timeout") from None

    async def _deltas(self, parts: Sequence[GenerationRequest]) -> AsyncGenerator[AnswerDelta, None]:
        self._check_queue()  # others may have come while the prompts were encoded
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            for number, part in enumerate(parts):
                async with contextlib.aclosing(self._steps(part)) as steps:
                    async for deltas in steps:
                        for delta in deltas:
                            yield delta._replace(number=number * part.n + delta.number)
        except Exception as error:
            # Whatever it is, it concerns this request alone; the next one begins anew.
            if self._out_of_memory(error):
                message = "out of memory; ask for a shorter prompt, a smaller n or fewer tokens"
                raise ApiError(503, message) from error
            raise
        finally:
            self._turn.release()

    async def _steps(self, part: GenerationRequest) -> AsyncGenerator[list[AnswerDelta], None]:
        steps = self._engine.deltas(part)
        step = self._thread.submit(next, steps, None)
        try:
            while deltas := await asyncio.wrap_future(step):
                step = self._thread.submit(next, steps, None)  # computed while these are sent
                yield deltas
        finally:
            step.cancel()
            self._thread.submit(steps.close)  # after the step that runs
