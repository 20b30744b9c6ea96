"""The server of `ivon-post serve` on a real socket of this process, or as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from axolotl_ivon.serving.api.app import Guard, make_app
from axolotl_ivon.serving.api.http import bind, make_server
from axolotl_ivon.serving.backend import Backend


@contextlib.contextmanager
def serving(begin: Callable[[], Backend], guard: Guard | None = None) -> Iterator[str]:
    """Serve inside the block, and give the address; leaving waits for what runs."""
    ready = threading.Event()
    server = make_server(make_app(begin(), guard or Guard()), ready.set)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, args=[[bound]])
        thread.start()
        try:
            assert ready.wait(30)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Return (status, headers, body) of one request; JSON is read."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, data, own)
        response = connection.getresponse()
        text = response.read()
    kind = response.headers.get("Content-Type", "")
    return response.status, dict(response.headers), json.loads(text) if kind == "application/json" else text.decode()


def connect(url: str) -> socket.socket:
    """Return a connection that nothing was sent on."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)
