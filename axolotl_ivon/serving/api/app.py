"""The routes: OpenAI's interface, health, metrics and the page, with what keeps a stranger out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..backend import Answers, Backend
from .http import is_loopback
from .monitoring import Metrics
from .protocol import ChatRequest, CompletionRequest, Refusal, Request, Writer, read_request, usage

log = logging.getLogger("ivon_post.serve")
_PAGE = Path(__file__).with_name("page.html")
_PATHS: dict[str, type[Request]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_GONE = 499  # nginx's status for a client that did not wait
_BROKEN = Refusal(500, "something went wrong here; the log has it")
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Guard:
    """Who may ask, and how much of it.

    Attributes:
        api_key: what a request has to show as `Authorization: Bearer …`; None: nobody has to, and only requests to this
            machine by name or address are taken, which a page of somebody else's in a browser here cannot make.
        max_body: bytes of a request.
        body_timeout: seconds for them to come in.
        timeout: seconds for a whole request, reading of the response included.
    """

    api_key: str | None = None
    max_body: int = 1_000_000
    body_timeout: float = 30.0
    timeout: float = 660.0

    def check(self, request: HTTPRequest) -> None:
        """Raise Refusal if the request may not be made."""
        if self.api_key is None:
            host = request.headers.get("host", "")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if not is_loopback(name.strip("[]").lower()):
                raise Refusal(403, "without an API key this server answers under localhost and 127.0.0.1 only")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # Hashes are of one length, whatever is given: the time of the comparison tells nothing.
        digests = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in (given, self.api_key)]
        if not hmac.compare_digest(*digests) or kind.lower() != "bearer":
            raise Refusal(
                401,
                "no such API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def body(self, request: HTTPRequest) -> object:
        """Return the JSON of a request's body.

        Raises:
            Refusal: there is none, it is too large, or it does not come in time.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a browser sends nowhere else unasked
            raise Refusal(415, "send JSON, with Content-Type: application/json")
        try:
            data = await asyncio.wait_for(self._read(request), self.body_timeout)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self.body_timeout:g} s", headers={"Connection": "close"}
            ) from None
        try:
            body = json.loads(data)
            if b"\\ud" in data.lower():  # half of a pair, which no text can hold
                json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not valid JSON") from None
        return body

    async def _read(self, request: HTTPRequest) -> bytes:
        too_large = Refusal(
            413, f"the body has more than {self.max_body} bytes, the most here", headers={"Connection": "close"}
        )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            raise too_large
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.max_body:
                raise too_large
        return bytes(data)


def make_app(backend: Backend, guard: Guard) -> ASGIApp:
    """Return the application that serves a backend."""
    metrics = Metrics(backend.gauges)

    async def complete(request: HTTPRequest) -> Response:
        guard.check(request)
        asked = read_request(_PATHS[request.url.path], await guard.body(request))
        if asked.model not in backend.models:
            raise Refusal(
                404,
                f"the model {asked.model[:100]!r} is not served here; GET /v1/models tells which are",
                param="model",
                code="model_not_found",
            )
        answers = await backend.answer(asked)
        return _Completion(asked, answers, metrics, request.state.begun)

    async def models(request: HTTPRequest) -> Response:
        guard.check(request)
        own = [{"id": name, "object": "model", "created": started, "owned_by": "ivon-post"} for name in backend.models]
        return JSONResponse({"object": "list", "data": own})

    async def model(request: HTTPRequest) -> Response:
        guard.check(request)
        name = request.path_params["name"]
        if name not in backend.models:
            raise Refusal(404, f"the model {name[:100]!r} is not served here", param="model", code="model_not_found")
        return JSONResponse({"id": name, "object": "model", "created": started, "owned_by": "ivon-post"})

    async def health(request: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def numbers(request: HTTPRequest) -> Response:
        guard.check(request)
        return Response(metrics.text(), media_type=metrics.content_type)

    async def page(request: HTTPRequest) -> Response:
        return HTMLResponse(
            _PAGE.read_text(encoding="utf-8"),
            headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"},
        )

    async def refuse(request: HTTPRequest, refusal: Refusal) -> Response:
        return _refused(refusal)

    async def no_route(request: HTTPRequest, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return _refused(Refusal(error.status_code, told, headers=error.headers))

    async def gone(request: HTTPRequest, error: ClientDisconnect) -> Response:
        return Response(status_code=_GONE)  # which nobody reads

    async def broken(request: HTTPRequest, error: Exception) -> Response:
        return _refused(_BROKEN)  # `_Outermost` logs it

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await backend.close()

    started = int(time.time())
    routes = [
        *(Route(path, complete, methods=["POST"]) for path in _PATHS),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", numbers),
        Route("/", page),
    ]
    handlers: Any = {Refusal: refuse, HTTPException: no_route, ClientDisconnect: gone, Exception: broken}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return _Outermost(app, metrics, guard.timeout, {route.path for route in routes})


class _Outermost:
    """Counts and times requests, ends those that take too long, and tells nobody outside what went wrong inside."""

    def __init__(self, app: ASGIApp, metrics: Metrics, timeout: float, paths: set[str]) -> None:
        self._app, self._metrics, self._timeout, self._paths = app, metrics, timeout, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        scope.setdefault("state", {})["begun"] = begun

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await asyncio.wait_for(self._app(scope, receive, sent), self._timeout)
        except asyncio.TimeoutError:
            if not status:
                await _refused(Refusal(504, "the request took too long", code="timeout"))(scope, receive, sent)
        except Exception:
            log.exception("a request failed")
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, status or _GONE, time.monotonic() - begun)


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.document(), refusal.status, headers=refusal.headers)


class _Completion(Response):
    """The answers to a request, whole or as server-sent events; a client that goes away ends the work on them."""

    def __init__(self, request: Request, answers: Answers, metrics: Metrics, begun: float) -> None:
        self.background = None
        self._request, self._answers, self._metrics, self._begun = request, answers, metrics, begun
        self._writer = Writer(request, answers.choices)
        self._generated = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        write = self._stream(send) if self._request.stream else self._whole(scope, receive, send)
        writing, gone = asyncio.ensure_future(write), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self._answers.pieces.aclose()
            self._metrics.tokens(self._answers.prompt_tokens, self._generated)

    async def _pieces(self) -> AsyncIterator[Any]:
        begun = False
        async for piece in self._answers.pieces:
            if not begun:
                begun = True
                self._metrics.first_token(time.monotonic() - self._begun)
            self._generated += piece.generated
            if piece.ivon:
                self._metrics.answer(piece.ivon)
            yield piece

    def _usage(self) -> Mapping[str, int]:
        if self._answers.generated is not None:
            self._generated = self._answers.generated
        return usage(self._answers.prompt_tokens, self._generated)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [piece async for piece in self._pieces()]
        await JSONResponse(self._writer.whole(pieces, self._usage()))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        pieces = self._pieces()
        first = await anext(pieces)  # what is refused before it has a status of its own
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(document: Mapping[str, Any] | str) -> None:
            text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            for chunk in self._writer.chunks(first):
                await event(chunk)
            async for piece in pieces:
                for chunk in self._writer.chunks(piece):
                    await event(chunk)
            for chunk in self._writer.end(self._usage()):
                await event(chunk)
        except Refusal as refusal:
            await event(refusal.document())
        except Exception:
            log.exception("a stream failed")
            await event(_BROKEN.document())
        else:
            await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
