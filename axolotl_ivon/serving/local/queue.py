"""Answers from a model in memory, one request after the other, in a thread of the model's own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from accelerate.utils.memory import clear_device_cache

from ...data.encode import EncodedExample
from ...errors import IVONError
from ...models.batching import out_of_memory
from ..api.answer_schema import longest_value
from ..api.backend import AnswerStream, Backend, Deltas, Limits, queue_full
from ..api.protocol import ApiError, ChatRequest, Request
from .engine import GenerationRequest, TokenEngine

_Prompt = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # its tokens, and those of each label after it


class Local(Backend):
    """Answers from an engine in memory.

    `encode` returns the tokens of a prompt: a text, token ids or the messages of a chat, after which it gets the
    request's arguments of the chat template. It is called from one thread at a time, but never from the engine's.
    `encode_labels` gets the labels of which the answer is one before these arguments, and returns their tokens too.
    `labels` and `system_prompt` are those of training; `expected_confidence` is the mean on validation data.
    """

    def __init__(
        self,
        engine: TokenEngine,
        encode: Callable[..., Sequence[int]],
        limits: Limits,
        encode_labels: Callable[..., EncodedExample] | None = None,
        labels: Sequence[str] = (),
        system_prompt: str = "",
        expected_confidence: float | None = None,
    ) -> None:
        self._engine, self._encode, self._limits = engine, encode, limits
        self._encode_labels, self._labels, self._system_prompt = encode_labels, labels, system_prompt
        self._expected = expected_confidence
        self._encoding, self._turn = asyncio.Lock(), asyncio.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "ivon-serve")

    @property
    def models(self) -> Collection[str]:
        return self._engine.models

    @property
    def labels(self) -> Sequence[str]:
        return self._labels

    @property
    def system_prompt(self) -> str:
        return self._system_prompt

    def gauges(self) -> Mapping[str, float]:
        known = {} if self._expected is None else {"confidence_expected": self._expected}
        return {"waiting": self._waiting, "running": float(self._turn.locked()), **known}

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, request: Request) -> AnswerStream:
        self._limits.check(request)
        self._check_queue()
        async with self._encoding:
            prompts = await asyncio.to_thread(self._encoded, request)
        parts = [self._part(request, number, *prompt) for number, prompt in enumerate(prompts)]
        answers = AnswerStream(sum(len(ids) for ids, _ in prompts), len(parts) * request.n)
        answers.deltas = self._in_time(self._deltas(parts))
        return answers

    def _check_queue(self) -> None:
        if self._waiting >= self._limits.max_queue and self._turn.locked():
            raise queue_full(f"{self._waiting} requests are waiting")

    def _encoded(self, request: Request) -> list[_Prompt]:
        labels = request.labels
        if labels and self._encode_labels is None:
            raise ApiError(400, "choices are not supported here; leave them out", param="structured_outputs")
        try:
            own = [request.chat_template_kwargs] if isinstance(request, ChatRequest) else []
            prompts: list[_Prompt] = []
            for prompt in request.prompts:
                if labels and self._encode_labels:
                    item = self._encode_labels(prompt, labels, *own)
                    prompts.append((tuple(item.ids), item.candidates or ()))
                else:
                    longest = ", ".join(f'"{name}": {longest_value(values)}' for name, values in request.fields.items())
                    room = (tuple(self._encode(f"{{{longest}}}")),) if longest else ()
                    prompts.append((tuple(self._encode(prompt, *own)), room))
            for ids, _ in prompts:
                if not ids:
                    raise IVONError("the prompt is empty")
                self._engine.check(ids)
        except IVONError as error:
            raise ApiError(400, str(error), param="structured_outputs" if labels else request.prompt_field) from None
        return prompts

    def _part(
        self, request: Request, number: int, ids: tuple[int, ...], candidates: tuple[tuple[int, ...], ...]
    ) -> GenerationRequest:
        """Return what the engine is asked for one prompt; raise ApiError if the answer would be too long."""
        max_tokens, max_length = self._limits.max_tokens, self._engine.max_length
        room = max_tokens if max_length is None else max_length - len(ids)
        default = min(max_tokens, room) if isinstance(request, ChatRequest) else 16  # as OpenAI has it
        wanted = max(request.max_tokens or default, 1)
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
