"""What the server asks for answers: a model in memory behind a queue, with one thread that works it off."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import IVONError
from .api.protocol import ChatRequest, CompletionRequest, Refusal, Request
from .pieces import Ask, Piece


@dataclass
class Answers:
    """The answers to one request, as they come.

    Attributes:
        prompt_tokens: of all prompts.
        choices: how many answers there will be.
        pieces: of all of them, in any order of the answers; closing it ends the work.
        generated: how many tokens they took, where somebody knows better than the pieces do, after the last of them.
    """

    prompt_tokens: int
    choices: int
    pieces: AsyncGenerator[Piece, None]
    generated: int | None = None


class Backend(Protocol):
    """What answers."""

    @property
    def models(self) -> Collection[str]:
        """The names that are served."""
        ...

    async def answer(self, request: Request) -> Answers:
        """Begin to answer a request whose model is one of `models`.

        Raises:
            Refusal: it is not answered, which may also come with the pieces.
        """
        ...

    def gauges(self) -> Mapping[str, float]:
        """Return what there is to watch: numbers by name."""
        ...

    async def close(self) -> None:
        """End, after all answers."""
        ...


class Steps(Protocol):
    """What of `engine.Engine` is needed here, so that nothing here needs torch."""

    longest: int | None

    @property
    def models(self) -> Mapping[str, slice]:
        """The served names, and the members that each is the average of."""
        ...

    def check(self, ids: tuple[int, ...]) -> None:
        """Raise IVONError if a prompt is not one of the model's."""
        ...

    def pieces(self, ask: Ask) -> Generator[list[Piece], None, None]:
        """Yield what every token adds."""
        ...


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        max_queue: how many requests wait for the model; further ones are refused with 429.
        max_tokens: of an answer; what a request that does not say gets.
        timeout: seconds for a request, waiting included.
    """

    max_queue: int = 32
    max_tokens: int = 2048
    timeout: float = 600.0


@dataclass
class _Job:
    asks: Sequence[Ask]
    deadline: float
    loop: asyncio.AbstractEventLoop
    found: asyncio.Queue[list[Piece] | BaseException | None] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def tell(self, what: list[Piece] | BaseException | None) -> None:
        """Hand something over to the event loop, from the thread of the model."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self.loop.call_soon_threadsafe(self.found.put_nowait, what)


class Local:
    """Answers from an engine here, one request after the other.

    Args:
        encode_chat, encode_text: return a prompt's tokens; called from one thread at a time, another than the engine's.
        out_of_memory: says whether an exception is that the memory ran out, and clears what can be.
    """

    def __init__(
        self,
        engine: Steps,
        encode_chat: Callable[[list[dict[str, str]]], Sequence[int]],
        encode_text: Callable[[str], Sequence[int]],
        limits: Limits,
        out_of_memory: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        self._engine, self._limits = engine, limits
        self._encode_chat, self._encode_text = encode_chat, encode_text
        self._out_of_memory = out_of_memory
        self._waiting: collections.deque[_Job] = collections.deque()
        self._running: _Job | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._encoding = asyncio.Lock()
        self._thread = threading.Thread(target=self._work, name="ivon-serve", daemon=True)
        self._thread.start()

    @property
    def models(self) -> Collection[str]:
        """See `Backend`."""
        return self._engine.models

    def gauges(self) -> Mapping[str, float]:
        """See `Backend`."""
        return {"waiting": len(self._waiting), "running": float(self._running is not None)}

    async def answer(self, request: Request) -> Answers:
        """See `Backend`."""
        self._check_queue()
        async with self._encoding:
            prompts = await asyncio.to_thread(self._prompts, request)
        asks = self._asks(request, prompts)
        self._check_queue()  # others may have come meanwhile
        job = _Job(asks, time.monotonic() + self._limits.timeout, asyncio.get_running_loop())
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return Answers(sum(map(len, prompts)), len(asks) * request.n, self._pieces(job))

    async def close(self) -> None:
        """See `Backend`."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _check_queue(self) -> None:
        if len(self._waiting) >= self._limits.max_queue and (self._waiting or self._running):
            raise Refusal(
                429,
                f"{len(self._waiting)} requests are waiting already; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _prompts(self, request: Request) -> list[tuple[int, ...]]:
        try:
            if isinstance(request, ChatRequest):
                prompts = [tuple(self._encode_chat([message.plain() for message in request.messages]))]
            else:
                assert isinstance(request, CompletionRequest)
                prompts = [tuple(self._encode_text(p) if isinstance(p, str) else p) for p in request.prompts]
            for ids in prompts:
                if not ids:
                    raise IVONError("prompt: there is nothing to go on from; it has no tokens")
                self._engine.check(ids)
        except IVONError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise Refusal(400, str(error), param=param) from None
        return prompts

    def _asks(self, request: Request, prompts: Sequence[tuple[int, ...]]) -> list[Ask]:
        most, longest = self._limits.max_tokens, self._engine.longest
        if request.max_tokens is not None and request.max_tokens > most:
            raise Refusal(400, f"max_tokens {request.max_tokens}: this server gives at most {most}", param="max_tokens")
        asks = []
        for number, ids in enumerate(prompts):
            room = most if longest is None else longest - len(ids)
            wanted = request.max_tokens or (min(most, room) if isinstance(request, ChatRequest) else 16)
            if room < max(wanted, 1):
                raise Refusal(
                    400,
                    f"the prompt has {len(ids)} tokens and max_tokens is {max(wanted, 1)}; the model takes {longest} "
                    "together",
                    param="messages" if isinstance(request, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
            asks.append(
                Ask(
                    model=request.model,
                    ids=ids,
                    n=request.n,
                    max_tokens=wanted,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    stop=tuple(request.stop),
                    top=request.top,
                    seed=secrets.randbits(63) if request.seed is None else request.seed + number,
                )
            )
        return asks

    async def _pieces(self, job: _Job) -> AsyncGenerator[Piece, None]:
        try:
            while True:
                left = job.deadline - time.monotonic()
                found = await asyncio.wait_for(job.found.get(), max(left, 0.0))
                if found is None:
                    return
                if isinstance(found, BaseException):
                    raise found
                for piece in found:
                    yield piece
        except asyncio.TimeoutError:
            raise Refusal(504, f"the answer took longer than {self._limits.timeout:g} s", code="timeout") from None
        finally:
            job.cancelled = True  # the engine sees it at its next token
            with contextlib.suppress(ValueError), self._changed:
                self._waiting.remove(job)

    def _work(self) -> None:
        """Work the queue off; the thread of the model."""
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                self._running = job = self._waiting.popleft()
            try:
                self._run(job)
                job.tell(None)
            except Exception as error:
                # Whatever it is, it is that request's, and the next one begins anew.
                refusal: BaseException = error
                if self._out_of_memory(error):
                    refusal = Refusal(503, "out of memory; ask for a shorter prompt, a smaller n or fewer tokens")
                job.tell(refusal)

    def _run(self, job: _Job) -> None:
        for number, ask in enumerate(job.asks):
            with contextlib.closing(self._engine.pieces(ask)) as steps:
                for pieces in steps:
                    if job.cancelled:
                        return
                    job.tell([piece._replace(number=number * ask.n + piece.number) for piece in pieces])
