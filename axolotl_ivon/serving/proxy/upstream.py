"""Answers from OpenAI-compatible servers that serve the members of an ensemble: vLLM, which scales past one machine.

Every server has every member. A request goes to the one with the fewest requests running; one that fails is left out
until it is well again, and what it was asked for is asked elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from ...noise import generator
from ..api.protocol import ChatRequest, CompletionRequest, Refusal, Request
from ..backend import Answers, Limits
from ..pieces import LEAST_LOGPROB, Piece, Token, answer_facts, token_facts
from .mixture import Candidate, Chosen, Scores, by_score, coarse_entropies, unique

TOP = 20  # likeliest tokens that are asked for, the most that vLLM gives unless told otherwise
_PROBE = 2.0  # seconds between looks at a server that failed
_CONNECT_TIMEOUT = 5.0
_KEPT = 2.0  # seconds that a connection is kept; uvicorn, which vLLM runs on, keeps its end for 5
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=10)
_LONGEST_LINE = 2**20  # of an event, which has the likeliest tokens of several places
_UNREACHED = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
_FAILED = {500, 502, 503, 504}
# Chooses among the candidates of all members, n of them; None: by their scores.
Choose = Callable[[Sequence[Candidate], int], list[Chosen]]


class _Failed(Exception):
    """A server that could not answer; another may."""


@dataclass
class Upstream:
    """One server.

    Attributes:
        url: that its paths begin with, /v1 included.
        gate: through which requests get to it.
        running: requests that it works on, or that wait for it.
        well: whether it is asked.
    """

    url: str
    gate: asyncio.Semaphore
    running: int = 0
    well: bool = True


class Upstreams:
    """Answers from several servers; see `backend.Backend`.

    Args:
        urls: of the servers, with or without /v1.
        members: the names of the draws there, and under "mean" that of the mean if it is served.
        name: of their combination.
        choose: chooses among candidates; None: every member scores all of them (`combine.by_score`).
        candidates: how many every member gives.
        concurrency: requests at a time to each server.
        threshold: of the confidence of a member, and of scored answers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        members: Sequence[str],
        *,
        name: str,
        limits: Limits,
        mean: str | None = None,
        choose: Choose | None = None,
        candidates: int = 1,
        concurrency: int = 256,
        threshold: float | None = None,
    ) -> None:
        self._upstreams = [
            Upstream(root if root.endswith("/v1") else f"{root}/v1", asyncio.Semaphore(concurrency))
            for root in (url.rstrip("/") for url in urls)
        ]
        self._members, self._limits, self._choose = members, limits, choose
        self._candidates, self._threshold = candidates, threshold
        self._served: dict[str, str | None] = {name: None}
        if mean is not None:
            self._served[f"{name}:mean"] = mean
        self._served |= {f"{name}:member-{number:04d}": member for number, member in enumerate(members)}
        self._session: aiohttp.ClientSession | None = None  # made in the loop that it works in
        self._requests = 0
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def models(self) -> Collection[str]:
        """See `Backend`."""
        return self._served

    def gauges(self) -> Mapping[str, float]:
        """See `Backend`."""
        return {"running": self._requests, "upstreams_well": sum(own.well for own in self._upstreams)}

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            key = os.environ.get("OPENAI_API_KEY")
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=self._limits.timeout
                ),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT),
                read_bufsize=_LONGEST_LINE,
            )
        return self._session

    async def close(self) -> None:
        """See `Backend`."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def answer(self, request: Request) -> Answers:
        """See `Backend`."""
        if self._requests >= self._limits.max_queue:
            raise Refusal(
                429,
                f"{self._requests} requests are running already; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        if request.max_tokens is not None and request.max_tokens > self._limits.max_tokens:
            raise Refusal(
                400,
                f"max_tokens {request.max_tokens}: this server gives at most {self._limits.max_tokens}",
                param="max_tokens",
            )
        member = self._served[request.model]
        prompts = request.prompts if isinstance(request, CompletionRequest) else [None]
        answers = Answers(0, len(prompts) * request.n, _nothing())
        answers.pieces = self._counted(self._pieces(request, prompts, member, answers))
        return answers

    async def _counted(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        self._requests += 1
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield piece
        finally:
            self._requests -= 1

    async def _pieces(
        self, request: Request, prompts: Sequence[Any], member: str | None, answers: Answers
    ) -> AsyncGenerator[Piece, None]:
        seed = secrets.randbits(31) if request.seed is None else request.seed
        for number, prompt in enumerate(prompts):
            body = _body(request, prompt, 1 if member is None else TOP)
            if member is None:
                found = await self._combined(request, body, seed + number, answers)
                for index, chosen in enumerate(found):
                    own, place = chosen.candidate, number * request.n + index
                    tokens = chosen.tokens if request.top is not None else ()
                    ivon = chosen.ivon | ({"tokens": list(map(token_facts, tokens))} if tokens else {})
                    yield Piece(place, own.text, tokens, own.finish, ivon, own.generated)
                continue
            asked = {**body, "model": member, "n": request.n, "seed": seed + number, "stream": request.stream}
            single = self._streamed if request.stream else self._whole
            async with contextlib.aclosing(single(request, asked, answers)) as pieces:
                async for piece in pieces:
                    yield piece._replace(number=number * request.n + piece.number)

    # --- one member --------------------------------------------------------------------------------------------

    async def _whole(self, request: Request, body: dict[str, Any], answers: Answers) -> AsyncGenerator[Piece, None]:
        found = await self._post(_path(request), body)
        with _understanding():
            answers.prompt_tokens += int(found["usage"]["prompt_tokens"])
            generated = _shares(int(found["usage"]["completion_tokens"]), len(found["choices"]))
            pieces = []
            for choice, count in zip(found["choices"], generated, strict=True):
                text = _text(choice, "message")
                teller = _Teller(request, self._threshold)
                piece = teller.piece(int(choice["index"]), text, choice.get("logprobs"), str(choice["finish_reason"]))
                pieces.append(piece._replace(generated=count))
        for piece in pieces:
            yield piece

    async def _streamed(self, request: Request, body: dict[str, Any], answers: Answers) -> AsyncGenerator[Piece, None]:
        tellers = [_Teller(request, self._threshold) for _ in range(request.n)]
        asked = {**body, "stream_options": {"include_usage": True}}
        ended = 0
        async with contextlib.aclosing(self._events(_path(request), asked)) as events:
            async for event in events:
                with _understanding():
                    if event.get("usage") and not event["choices"]:
                        answers.prompt_tokens += int(event["usage"]["prompt_tokens"])
                        answers.generated = (answers.generated or 0) + int(event["usage"]["completion_tokens"])
                    pieces = []
                    for choice in event["choices"]:
                        number, finish = int(choice["index"]), choice.get("finish_reason")
                        text = _text(choice, "delta")
                        pieces.append(tellers[number].piece(number, text, choice.get("logprobs"), finish))
                        ended += finish is not None
                for piece in pieces:
                    yield piece
        if ended < request.n:
            raise Refusal(502, "the server behind this one stopped in the middle of its answer")

    # --- all members -------------------------------------------------------------------------------------------

    async def _combined(self, request: Request, body: dict[str, Any], seed: int, answers: Answers) -> list[Chosen]:
        count = self._candidates if request.temperature else 1
        asked = [
            {
                **body,
                "model": member,
                "n": count,
                "seed": int(generator("serve", seed, number).bit_generator.random_raw() >> 33),
                **({} if self._choose else {"return_token_ids": True}),
            }
            for number, member in enumerate(self._members)
        ]
        found = await _together([self._post(_path(request), own) for own in asked])
        with _understanding():
            answers.prompt_tokens += int(found[0]["usage"]["prompt_tokens"])
            candidates = [
                own for number, response in enumerate(found) for own in _candidates(response, number, request)
            ]
        if self._choose:
            # Comparing texts may take a while.
            return await asyncio.to_thread(self._choose, candidates, request.n)
        prompt = _prompt_ids(found[0])
        if prompt is None or any(candidate.ids is None for candidate in candidates):
            raise Refusal(502, "the servers behind this one tell no token ids (return_token_ids); use vLLM ≥ 0.10.2")
        different = unique(candidates)
        scored = await _together(
            [self._score(prompt, candidate, member) for candidate in different for member in self._members]
        )
        size = len(self._members)
        rows = [scored[start : start + size] for start in range(0, len(scored), size)]
        return by_score(different, rows, request.n, threshold=self._threshold)

    async def _score(self, prompt: list[int], candidate: Candidate, member: str) -> Scores:
        ids = candidate.ids or ()
        body = {
            "model": member,
            "prompt": [*prompt, *ids],
            "echo": True,
            "logprobs": TOP,
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        found = await self._post("completions", body)
        with _understanding():
            held = found["choices"][0]["logprobs"]
            part = slice(len(prompt), len(prompt) + len(ids))
            logprobs = tuple(_finite(value) for value in held["token_logprobs"][part])
            if len(logprobs) != len(ids):
                raise ValueError
            tops = held.get("top_logprobs") or []
            return Scores(logprobs, tuple({k: _finite(v) for k, v in own.items()} for own in tops[part]))

    # --- the servers -------------------------------------------------------------------------------------------

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that a server answers with; one that fails is left out, and another asked."""

        async def ask(upstream: Upstream) -> Any:
            async with upstream.gate, self._client().post(f"{upstream.url}/{path}", json=body) as response:
                data = await response.read()
            _check(response.status, data)
            with _understanding():
                return json.loads(data)

        return await self._on_some(ask)

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a stream; once it has begun, no other server can go on with it."""

        async def ask(upstream: Upstream) -> tuple[aiohttp.ClientResponse, Upstream]:
            await upstream.gate.acquire()
            try:
                response = await self._client().post(f"{upstream.url}/{path}", json=body)
                if response.status != 200:
                    async with response:
                        _check(response.status, await response.read())
            except BaseException:
                upstream.gate.release()
                raise
            return response, upstream

        response, upstream = await self._on_some(ask)
        upstream.running += 1
        try:
            async for line in response.content:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if not data or data == b"[DONE]":
                    continue
                with _understanding():
                    event = json.loads(data)
                    if "error" in event:
                        raise Refusal(502, "the server behind this one failed in the middle of its answer")
                    event["choices"]
                yield event
        except _UNREACHED:
            self._leave_out(upstream)
            raise Refusal(502, "the server behind this one stopped in the middle of its answer") from None
        finally:
            upstream.running -= 1
            upstream.gate.release()
            response.close()

    async def _on_some(self, ask: Callable[[Upstream], Any]) -> Any:
        """Return what `ask` gets from the server with the fewest requests; of those that fail each is tried once."""
        tried: set[int] = set()
        refused: Refusal | None = None
        while True:
            # When none is well, those that failed before may be again.
            left = [own for own in self._upstreams if id(own) not in tried]
            left = [own for own in left if own.well] or left
            if not left:
                raise refused or Refusal(
                    502, "none of the servers behind this one answers", headers={"Retry-After": "2"}
                )
            upstream = min(left, key=lambda own: own.running)
            tried.add(id(upstream))
            upstream.running += 1
            try:
                try:
                    return await ask(upstream)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    # A connection that was kept may have been closed there meanwhile: one more, with another.
                    return await ask(upstream)
            except (_Failed, *_UNREACHED):
                self._leave_out(upstream)
            except Refusal as refusal:
                if refusal.status != 429:
                    raise
                refused = refusal  # it is busy, which is no failure
            finally:
                upstream.running -= 1

    def _leave_out(self, upstream: Upstream) -> None:
        if upstream.well:
            upstream.well = False
            probe = asyncio.get_running_loop().create_task(self._probe(upstream))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    async def _probe(self, upstream: Upstream) -> None:
        while not upstream.well:
            await asyncio.sleep(_PROBE)
            with contextlib.suppress(*_UNREACHED):
                async with self._client().get(f"{upstream.url}/models", timeout=_PROBE_TIMEOUT) as response:
                    upstream.well = response.status == 200


class _Teller:
    """What a single member says of its tokens, in the pieces of one answer."""

    def __init__(self, request: Request, threshold: float | None) -> None:
        self._request, self._threshold = request, threshold
        self._tokens: list[Token] = []

    def piece(self, number: int, text: str, logprobs: Any, finish: str | None) -> Piece:
        tokens = _tokens(logprobs, isinstance(self._request, ChatRequest), self._request.top or 0)
        self._tokens += tokens
        ivon: dict[str, Any] | None = None
        if finish is not None:
            ivon = {"confidence": None, "expected_entropy": None, "mutual_information": 0.0, "members": 1}
            if self._tokens:
                ivon = answer_facts(self._tokens, 1, self._threshold)
            if self._request.top is not None:
                ivon["tokens"] = list(map(token_facts, self._tokens))
        shown = tuple(tokens) if self._request.top is not None else ()
        return Piece(number, text, shown, finish, ivon, len(tokens))


def _tokens(logprobs: Any, chat: bool, top: int) -> list[Token]:
    """Return the tokens that a server tells of, in either of OpenAI's ways."""
    if not logprobs:
        return []
    if chat:
        rows = [
            (own["token"], own["logprob"], {t["token"]: t["logprob"] for t in own.get("top_logprobs") or []})
            for own in logprobs.get("content") or []
        ]
    else:
        tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
        rows = list(zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True))
    found = []
    for name, logprob, others in rows:
        value, held = _finite(logprob), {str(k): _finite(v) for k, v in (others or {}).items()}
        entropy = coarse_entropies([held])[0] if held else 0.0
        likeliest = tuple(sorted(held.items(), key=lambda item: -item[1])[:top])
        found.append(Token(-1, str(name), str(name), value, likeliest, value, entropy, 0.0))
    return found


def _body(request: Request, prompt: Any, top: int) -> dict[str, Any]:
    """Return what every server is asked, without the model and how many answers."""
    body: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p}
    if isinstance(request, ChatRequest):
        body |= {"messages": [message.plain() for message in request.messages], "logprobs": True, "top_logprobs": top}
    else:
        body |= {"prompt": prompt, "logprobs": top}
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    return body | ({"stop": request.stop} if request.stop else {})


def _candidates(response: Mapping[str, Any], member: int, request: Request) -> list[Candidate]:
    generated = _shares(int(response["usage"]["completion_tokens"]), len(response["choices"]))
    found = []
    for choice, count in zip(response["choices"], generated, strict=True):
        tokens = _tokens(choice.get("logprobs"), isinstance(request, ChatRequest), 0)
        ids = choice.get("token_ids")
        finish = str(choice["finish_reason"])
        found.append(
            Candidate(
                _text(choice, "message"),
                member,
                math.fsum(token.logprob for token in tokens) if tokens else -math.inf,
                finish,
                len(ids) if ids else len(tokens) or count,
                None if ids is None else tuple(map(int, ids)),
                # A string that stops an answer is named there; a token that ends it is not.
                finish == "stop" and not isinstance(choice.get("stop_reason"), str),
                tuple(token.name for token in tokens),
            )
        )
    return found


def _prompt_ids(response: Mapping[str, Any]) -> list[int] | None:
    """Return the prompt's tokens: vLLM has them in the response to a chat, and in the choice of a completion."""
    held = response.get("prompt_token_ids") or response["choices"][0].get("prompt_token_ids")
    return None if held is None else list(map(int, held))


def _text(choice: Mapping[str, Any], where: str) -> str:
    held = choice[where].get("content") if where in choice else choice["text"]
    if held is not None and not isinstance(held, str):
        raise TypeError
    return held or ""


def _shares(total: int, count: int) -> list[int]:
    """Return a number as a sum of `count` numbers that differ by one at most."""
    return [total // count + (place < total % count) for place in range(count)]


def _finite(value: Any) -> float:
    return max(float(value), LEAST_LOGPROB)


def _path(request: Request) -> str:
    return "chat/completions" if isinstance(request, ChatRequest) else "completions"


def _check(status: int, data: bytes) -> None:
    """Raise `_Failed` if another server may do better, and Refusal if the request is refused."""
    if status == 200:
        return
    if status in _FAILED:
        raise _Failed
    if status == 429:
        raise Refusal(429, "the servers behind this one are busy; try again later", headers={"Retry-After": "1"})
    message = ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        held = json.loads(data)
        message = str(held.get("error", held)["message"])
    if status in (400, 422) and message:
        raise Refusal(400, " ".join(message.split())[:500])
    raise Refusal(502, f"the server behind this one refuses the request (status {status})")


@contextlib.contextmanager
def _understanding() -> Any:
    """Turn what is not as OpenAI's interface has it into a refusal: anybody may have written it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise Refusal(502, "the server behind this one does not answer as OpenAI's interface does") from None


async def _together(requests: Sequence[Any]) -> list[Any]:
    """Return the results of all; when one fails, or nobody waits any more, the others are ended."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _nothing() -> AsyncGenerator[Piece, None]:
    return
    yield  # which makes it a generator
