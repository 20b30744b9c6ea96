"""Answers from a model in memory, one request after the other, in a thread of the model's own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from accelerate.utils.memory import clear_device_cache

from ...models.batching import out_of_memory
from ..api.backend import AnswerStream, Backend, Deltas, Limits, queue_full
from ..api.prompts import PromptReader, TokenizedPrompt
from ..api.protocol import ApiError, ChatRequest, Request
from .engine import GenerationRequest, TokenEngine


class Local(Backend):
    """Answers from an engine in memory; `expected_confidence` is the mean on validation data."""

    def __init__(
        self, engine: TokenEngine, prompts: PromptReader, limits: Limits, expected_confidence: float | None = None
    ) -> None:
        super().__init__(prompts, limits)
        self._engine, self.models, self._expected = engine, engine.models, expected_confidence
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "ivon-serve")

    def gauges(self) -> Mapping[str, float]:
        known = {} if self._expected is None else {"confidence_expected": self._expected}
        return {"waiting": self._waiting, "running": float(self._turn.locked()), **known}

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, request: Request) -> AnswerStream:
        self.limits.check(request)
        self._check_queue()
        prompts = await self.prompts.read(request)
        parts = [self._part(request, number, prompt) for number, prompt in enumerate(prompts)]
        answers = AnswerStream(sum(len(prompt.ids) for prompt in prompts), len(parts) * request.n)
        answers.deltas = self._in_time(self._deltas(parts))
        return answers

    def _check_queue(self) -> None:
        if self._waiting >= self.limits.max_queue and self._turn.locked():
            raise queue_full(f"{self._waiting} requests are waiting")

    def _part(self, request: Request, number: int, prompt: TokenizedPrompt) -> GenerationRequest:
        """Return what the engine is asked for one prompt; raise ApiError if the answer would be too long."""
        ids, candidates = prompt
        wanted, max_length = self.limits.most_tokens(request), self._engine.max_length
        room = self.limits.max_tokens if max_length is None else max_length - len(ids)
        if isinstance(request, ChatRequest) and request.max_tokens is None:
            wanted = max(min(wanted, room), 1)
        if candidates:
            wanted = max(map(len, candidates))
        if room < wanted:
            message = (
                f"the prompt has {len(ids)} tokens and max_tokens is {wanted}; the model takes {max_length} together"
            )
            raise ApiError(400, message, param=request.prompt_field, code="context_length_exceeded")
        return GenerationRequest(
            model=request.model,
            ids=ids,
            n=request.n,
            max_tokens=wanted,
            temperature=request.temperature,
            top_p=request.top_p,
            stop=tuple(request.stop),
            top=request.top,
            seed=secrets.randbits(63) if request.seed is None else request.seed + number,
            labels=tuple(request.labels),
            fields=request.fields,
            candidates=candidates,
        )

    async def _in_time(self, deltas: Deltas) -> Deltas:
        """Yield `deltas` as long as the request has time."""
        deadline = time.monotonic() + self.limits.timeout
        async with contextlib.aclosing(deltas):
            while True:
                try:
                    yield await asyncio.wait_for(anext(deltas), max(0.0, deadline - time.monotonic()))
                except StopAsyncIteration:
                    return
                except asyncio.TimeoutError:
                    message = f"the answer took longer than {self.limits.timeout:g} s"
                    raise ApiError(504, message, code="timeout") from None

    async def _deltas(self, parts: Sequence[GenerationRequest]) -> Deltas:
        self._check_queue()  # others may have come while the prompts were encoded
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            for number, part in enumerate(parts):
                steps = self._engine.deltas(part)
                step = self._thread.submit(next, steps, None)
                try:
                    while deltas := await asyncio.wrap_future(step):
                        step = self._thread.submit(next, steps, None)  # computed while these are sent
                        for delta in deltas:
                            yield delta._replace(number=number * part.n + delta.number)
                finally:
                    step.cancel()
                    self._thread.submit(steps.close)  # after the step that runs
        except Exception as error:
            # Whatever it is, it concerns this request alone; the next one begins anew.
            if out_of_memory(error):
                clear_device_cache(garbage_collection=True)
                message = "out of memory; ask for a shorter prompt, a smaller n or fewer tokens"
                raise ApiError(503, message) from error
            raise
        finally:
            self._turn.release()
