"""The socket and the server on it: slow clients are cut off, and a termination lets running requests end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import IVONError, one_line, param_ref

HEADER_TIMEOUT = 10.0  # seconds until the head of a request must have arrived
_IDLE = 30  # seconds that a connection without a request stays open
_MAX_CONNECTIONS = 1000


def is_loopback(host: str) -> bool:
    """Return whether an address, or localhost, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; nobody can connect before the server listens. A taken address is an IVONError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise IVONError(
            f"{param_ref('port')} {port}: cannot listen on {host} ({reason}); name another {param_ref('port')}"
        ) from None
    return bound


class HeaderTimeoutProtocol(H11Protocol):
    """Closes a connection on which the head of a request does not end in time; uvicorn would wait for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """The server of an application; `ready` is called when it answers."""

    def __init__(self, app: ASGIApp, ready: Callable[[], None]) -> None:
        options: dict[str, Any] = {"http": HeaderTimeoutProtocol, "ws": "none", "lifespan": "on", "log_config": None}
        options |= {"timeout_keep_alive": _IDLE, "limit_concurrency": _MAX_CONNECTIONS}
        options |= dict.fromkeys(("access_log", "server_header", "date_header", "proxy_headers"), False)
        super().__init__(uvicorn.Config(app, **options))
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def run(app: ASGIApp, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests that are there; a second SIGINT ends at once."""
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # it raises the signal again after it has ended well
        Server(app, ready).run([bound])
