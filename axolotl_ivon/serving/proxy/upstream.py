"""The servers behind this one: which of them is asked, and what happens when one fails.

A request goes to the server with the fewest requests running. One that fails is left out until it answers again, and
the request goes to another. aiohttp rather than the `openai` client: over sockets to a server that answers at once,
with 64 clients, that one takes 3.6 times the processor time of a request over aiohttp, and 10 times over its default.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from ...generation.endpoint import MALFORMED, base_url, cancel_all
from ..api.protocol import ApiError

PROBE_INTERVAL = 2.0  # seconds between checks of a server that failed
_CONNECT_TIMEOUT = 5.0
_KEEP_ALIVE = 2.0  # seconds that a connection is kept; uvicorn, which vLLM runs on, keeps its end for 5
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=10)
_LONGEST_LINE = 2**20  # bytes of an event, which has the likeliest tokens of several places
_UNREACHED = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
_T = TypeVar("_T")


class _Failed(Exception):
    """A server that could not answer; another may."""


@dataclass
class Upstream:
    url: str  # /v1 included
    gate: asyncio.Semaphore  # limits the requests that it works on
    running: int = 0  # requests that it works on, or that wait for it
    well: bool = True  # whether it is asked


class UpstreamPool:
    """Several servers that answer the same requests, each at most `concurrency` at a time.

    A server from which no byte comes for `timeout` seconds has failed.
    """

    def __init__(self, urls: Sequence[str], concurrency: int = 256, timeout: float = 600.0) -> None:
        self._upstreams = [Upstream(base_url(url), asyncio.Semaphore(concurrency)) for url in urls]
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None  # made in the loop that it works in
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def well(self) -> int:
        """The number of servers that are asked."""
        return sum(upstream.well for upstream in self._upstreams)

    async def close(self) -> None:
        """Close all connections."""
        await cancel_all(self._probes)
        if self._session is not None:
            await self._session.close()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that a server answers with; raise ApiError if none answers, or one refuses the request."""

        async def ask(upstream: Upstream) -> Any:
            async with self._response(upstream, path, body) as response:
                data = await response.read()
            with malformed_as_502():
                return json.loads(data)

        return await self._on_any_upstream(ask)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a stream, as `post` does; once it has begun, no other server can continue it."""
        async with contextlib.AsyncExitStack() as stack:

            async def ask(upstream: Upstream) -> tuple[aiohttp.ClientResponse, Upstream]:
                return await stack.enter_async_context(self._response(upstream, path, body)), upstream

            response, upstream = await self._on_any_upstream(ask)
            try:
                async for line in response.content:
                    data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                    if not data or data == b"[DONE]":
                        continue
                    with malformed_as_502():
                        event = json.loads(data)
                        if "error" in event:
                            raise ApiError(502, "the server behind this one failed in the middle of its answer")
                    yield event
            except _UNREACHED:
                self._leave_out(upstream)
                raise broken_off() from None

    @contextlib.asynccontextmanager
    async def _response(
        self, upstream: Upstream, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        upstream.running += 1
        try:
            async with upstream.gate, self._client().post(f"{upstream.url}/{path}", json=body) as response:
                if response.status in (500, 502, 503, 504):
                    raise _Failed
                if response.status != 200:
                    raise _refusal(response.status, await response.read())
                yield response
        finally:
            upstream.running -= 1

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            key = os.environ.get("OPENAI_API_KEY")
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
                read_bufsize=_LONGEST_LINE,
            )
        return self._session

    async def _on_any_upstream(self, ask: Callable[[Upstream], Awaitable[_T]]) -> _T:
        """Return the result of `ask` for one server; after a failure each of the others is tried once."""
        untried = list(self._upstreams)
        error = ApiError(502, "none of the servers behind this one answers", headers={"Retry-After": "2"})
        while untried:
            # If none is well, those that failed before may be again.
            upstream = min(untried, key=lambda upstream: (not upstream.well, upstream.running))
            untried.remove(upstream)
            try:
                try:
                    return await ask(upstream)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    # The server may have closed a kept connection meanwhile: once more, over another.
                    return await ask(upstream)
            except (_Failed, *_UNREACHED):
                self._leave_out(upstream)
            except ApiError as refusal:
                if refusal.status != 429:
                    raise
                error = refusal  # the server is busy, which is no failure
        raise error

    def _leave_out(self, upstream: Upstream) -> None:
        if upstream.well:
            upstream.well = False
            probe = asyncio.get_running_loop().create_task(self._probe(upstream))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    async def _probe(self, upstream: Upstream) -> None:
        while not upstream.well:
            await asyncio.sleep(PROBE_INTERVAL)
            with contextlib.suppress(*_UNREACHED):
                async with self._client().get(f"{upstream.url}/models", timeout=_PROBE_TIMEOUT) as response:
                    upstream.well = response.status == 200


def _refusal(status: int, data: bytes) -> ApiError:
    """Return the error of a request that no other server would answer either."""
    if status == 429:
        return ApiError(429, "the servers behind this one are busy; try again later", headers={"Retry-After": "1"})
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = json.loads(data)
        message = " ".join(str(document.get("error", document)["message"]).split())
        if status in (400, 422) and message:
            return ApiError(400, message[:500])
    return ApiError(502, f"the server behind this one refuses the request (status {status})")


def broken_off() -> ApiError:
    """Return the error of a stream that has no end."""
    return ApiError(502, "the server behind this one stopped in the middle of its answer")


@contextlib.contextmanager
def malformed_as_502() -> Iterator[None]:
    """Turn the errors of reading a malformed response into an ApiError: anybody may have written it."""
    try:
        yield
    except MALFORMED:
        raise ApiError(502, "the server behind this one does not answer as OpenAI's interface does") from None
