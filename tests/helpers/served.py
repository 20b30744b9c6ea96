"""The server of `ivon-post serve` on a real socket of this process, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

from axolotl_ivon.serving.api.app import Guard, make_app
from axolotl_ivon.serving.api.backend import Backend
from axolotl_ivon.serving.api.http import Server, bind

PATIENCE = 120.0  # seconds until a test fails; a loaded machine may take long


@contextlib.contextmanager
def serving(begin: Callable[[], Backend], guard: Guard | None = None) -> Iterator[str]:
    """Serve inside the block, and give the address; leaving waits for what runs, and tells what does not end."""
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def begun() -> None:
        loops.append(asyncio.get_running_loop())
        ready.set()

    server = Server(make_app(begin(), guard or Guard()), begun)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, args=[[bound]])
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            if thread.is_alive():
                faulthandler.dump_traceback()
                running = [f"{task}: {task.get_stack()}" for task in asyncio.all_tasks(loops[0])]
                raise AssertionError("\n".join([*running, *map(str, server.server_state.connections)]))


def official(url: str, key: str = "none") -> openai.OpenAI:
    """Return OpenAI's own client of a server."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Return (status, headers, body) of one request; JSON is read."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, data, own)
        response = connection.getresponse()
        text = response.read()
    kind = response.headers.get("Content-Type", "")
    return response.status, dict(response.headers), json.loads(text) if kind == "application/json" else text.decode()


def connect(url: str, sent: bytes = b"") -> socket.socket:
    """Return a connection on which bytes were sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.sendall(sent)
    return connection


def completion(body: bytes, length: int | None = None) -> bytes:
    """Return a request to /v1/completions as it goes over the wire, of a body that may be shorter than it says."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return head + b"%d\r\n\r\n" % (len(body) if length is None else length) + body


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return value
