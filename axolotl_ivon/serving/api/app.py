"""The application: OpenAI's interface, health, metrics and the page, and the checks of who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
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

from .answers import AnswerDelta
from .backend import AnswerStream, Backend
from .http import is_loopback
from .monitoring import Metrics
from .protocol import ApiError, ChatRequest, ClassifyRequest, CompletionRequest, Request, Writer, read_request, usage

log = logging.getLogger("ivon_post.serve")
_PAGE = Path(__file__).with_name("page.html")
_REQUESTS: dict[str, type[Request]] = {f"/v1/{kind.path}": kind for kind in (ChatRequest, CompletionRequest)}
_CLIENT_GONE = 499  # nginx's status for a client that did not wait
_FAILED = ApiError(500, "something went wrong here; the log has it")
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Guard:
    """Who may ask, and how large and slow a request may be.

    Without a key a request must name this machine as its host, which a foreign page in a browser here cannot do.
    """

    api_key: str | None = None  # what a request must show as `Authorization: Bearer …`
    max_body: int = 1_000_000  # bytes of a request
    body_timeout: float = 30.0  # seconds until they must have arrived
    timeout: float = 660.0  # seconds for a whole request, the reading of the response included

    def check(self, request: HTTPRequest) -> None:
        """Raise ApiError if the request may not be made."""
        if self.api_key is None:
            # Starlette's TrustedHostMiddleware knows no IPv6 address, no network (127.0.0.0/8) and no error in JSON.
            host = request.headers.get("host", "")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if not is_loopback(name.strip("[]").lower()):
                raise ApiError(403, "without an API key this server answers under localhost and 127.0.0.1 only")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # Hashes have one length: the time of the comparison reveals nothing.
        digests = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in (given, self.api_key)]
        if not hmac.compare_digest(*digests) or kind.lower() != "bearer":
            message = "no such API key; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def body(self, request: HTTPRequest) -> object:
        """Return the JSON of a request's body; raise ApiError if it is not JSON, too large or too slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a browser sends it to its own origin only, unless that is allowed
            raise ApiError(415, "send JSON, with Content-Type: application/json")
        closing = {"Connection": "close"}
        try:
            data = await asyncio.wait_for(self._read(request), self.body_timeout)
        except asyncio.TimeoutError:
            message = f"the body did not come within {self.body_timeout:g} s"
            raise ApiError(408, message, headers=closing) from None
        if data is None:
            raise ApiError(413, f"the body has more than {self.max_body} bytes, the most here", headers=closing)
        try:
            body = json.loads(data)
            if b"\\ud" in data.lower():  # half of a surrogate pair is no text
                json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not valid JSON") from None
        return body

    async def _read(self, request: HTTPRequest) -> bytes | None:
        """Return the body, or None as soon as it is known to be too large."""
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            return None
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.max_body:
                return None
        return bytes(data)


def make_app(backend: Backend, guard: Guard) -> ASGIApp:
    """Return the application that serves a backend."""
    metrics, prompts = Metrics(backend.gauges), backend.prompts
    started = int(time.time())

    def check_model(name: str) -> None:
        if name not in backend.models:
            message = f"the model {name[:100]!r} is not served here; GET /v1/models lists those that are"
            raise ApiError(404, message, param="model", code="model_not_found")

    def description(name: str) -> dict[str, Any]:
        trained = {"system_prompt": prompts.system_prompt, "labels": list(prompts.labels)}
        return {"id": name, "object": "model", "created": started, "owned_by": "ivon-post", "ivon": trained}

    async def complete(http: HTTPRequest) -> Response:
        guard.check(http)
        request = read_request(_REQUESTS[http.url.path], await guard.body(http))
        check_model(request.model)
        return _Completion(request, await backend.answer(request), metrics, http.state.begun)

    async def classify(http: HTTPRequest) -> Response:
        guard.check(http)
        request = read_request(ClassifyRequest, await guard.body(http))
        check_model(request.model)
        if not (labels := request.choices or prompts.labels):
            message = "the adapter does not say which answers its training data had; send choices"
            raise ApiError(400, message, param="choices")
        data, prompt_tokens = [], 0
        for index, each in enumerate(request.requests(labels)):
            try:
                answers = await backend.answer(each)
            except ApiError as error:  # it names the field of the chat that was made of this
                error.param = request.field_of(error.param)
                raise
            async with contextlib.aclosing(answers.deltas) as deltas:
                [delta] = [delta async for delta in deltas]
            prompt_tokens += answers.prompt_tokens
            ivon = dict(delta.ivon or {})
            metrics.answer(request.model, ivon)
            choices = ivon.pop("choices")
            probabilities = {"probs": list(choices.values()), "num_classes": len(choices)}
            data.append({"index": index, "label": delta.text, **probabilities, "labels": list(choices), "ivon": ivon})
        metrics.tokens(prompt_tokens, 0)
        head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return JSONResponse({**head, "model": request.model, "data": data, "usage": usage(prompt_tokens, 0)})

    async def models(http: HTTPRequest) -> Response:
        guard.check(http)
        return JSONResponse({"object": "list", "data": list(map(description, backend.models))})

    async def model(http: HTTPRequest) -> Response:
        guard.check(http)
        check_model(http.path_params["name"])
        return JSONResponse(description(http.path_params["name"]))

    async def health(http: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def prometheus(http: HTTPRequest) -> Response:
        guard.check(http)
        return Response(metrics.text(), media_type=metrics.content_type)

    async def page(http: HTTPRequest) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)

    async def failed(http: HTTPRequest, error: Exception) -> Response:
        return _error(error if isinstance(error, ApiError) else _FAILED)  # `_Boundary` logs what is no ApiError

    async def no_route(http: HTTPRequest, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path[:100]}: {error.detail}"
        return _error(ApiError(error.status_code, message, headers=error.headers or {}))

    async def gone(http: HTTPRequest, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)  # nobody reads it

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await backend.close()

    routes = [
        *(Route(path, complete, methods=["POST"]) for path in _REQUESTS),
        Route("/classify", classify, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", prometheus),
        Route("/", page),
    ]
    handlers: Any = {ApiError: failed, HTTPException: no_route, ClientDisconnect: gone, Exception: failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return _Boundary(app, metrics, guard.timeout, {route.path for route in routes})


def _error(error: ApiError) -> Response:
    return JSONResponse(error.document(), error.status, headers=error.headers)


class _Boundary:
    """Counts and times requests, ends those that take too long, and keeps errors inside."""

    def __init__(self, app: ASGIApp, metrics: Metrics, timeout: float, paths: set[str]) -> None:
        self._app, self._metrics, self._timeout, self._paths = app, metrics, timeout, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        scope.setdefault("state", {})["begun"] = begun

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await asyncio.wait_for(self._app(scope, receive, sending), self._timeout)
        except asyncio.TimeoutError:
            if not status:
                await _error(ApiError(504, "the request took too long", code="timeout"))(scope, receive, sending)
        except Exception:
            log.exception("a request failed")
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, status or _CLIENT_GONE, time.monotonic() - begun)


class _Completion(Response):
    """The answers to a request, whole or as server-sent events; a client that disconnects ends the work on them."""

    def __init__(self, request: Request, answers: AnswerStream, metrics: Metrics, begun: float) -> None:
        self.background = None
        self._request, self._answers, self._metrics, self._begun = request, answers, metrics, begun
        self._writer = Writer(request, answers.choices)
        self._generated = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        write = self._stream(send) if self._request.stream else self._whole(scope, receive, send)
        writing, gone = asyncio.ensure_future(write), asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self._answers.deltas.aclose()
            self._metrics.tokens(self._answers.prompt_tokens, self._generated)

    async def _deltas(self) -> AsyncIterator[AnswerDelta]:
        first = True
        async for delta in self._answers.deltas:
            if first:
                first = False
                self._metrics.first_token.observe(time.monotonic() - self._begun)
            self._generated += delta.generated
            if delta.ivon:
                self._metrics.answer(self._request.model, delta.ivon)
            yield delta

    def _usage(self) -> Mapping[str, int]:
        if self._answers.generated is not None:
            self._generated = self._answers.generated
        return usage(self._answers.prompt_tokens, self._generated)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = [delta async for delta in self._deltas()]
        await JSONResponse(self._writer.whole(deltas, self._usage()))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        deltas = self._deltas()
        first = await anext(deltas)  # what is refused before the first part gets a status of its own
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def events(documents: Iterable[Mapping[str, Any]]) -> None:
            for document in documents:
                await event(json.dumps(document, ensure_ascii=False))

        async def event(text: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            await events(self._writer.chunks(first))
            async for delta in deltas:
                await events(self._writer.chunks(delta))
            await events(self._writer.end(self._usage()))
        except ApiError as error:
            await events([error.document()])
        except Exception:
            log.exception("a stream failed")
            await events([_FAILED.document()])
        else:
            await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
