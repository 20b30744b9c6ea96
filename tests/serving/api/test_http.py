"""The socket and the server on it: who can reach it, and connections on which nothing comes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from served import completion, connect, serving
from slow_engine import LetterReader, SlowEngine

from axolotl_ivon import IVONError
from axolotl_ivon.serving.api import http
from axolotl_ivon.serving.api.backend import Limits
from axolotl_ivon.serving.api.http import bind
from axolotl_ivon.serving.local.queue import Local

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def impatient(slow: SlowEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that waits 0.3 s for the head of a request."""
    monkeypatch.setattr(http, "HEADER_TIMEOUT", 0.3)
    with serving(lambda: Local(slow, LetterReader(), Limits())) as url:
        yield url


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(IVONError, match=rf"port {port}: cannot listen on 127\.0\.0\.1 \(Address already in use\)"):
            bind("127.0.0.1", port)
    with pytest.raises(IVONError, match=r"cannot listen on no\.such\.host"):
        bind("no.such.host", 0)


def test_nobody_connects_before_the_server_is_there() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first request", "second request"])
@pytest.mark.parametrize("drip", [b"GET /health HTTP/1.1\r\nX-Slow: ", b"POST /v1/"])
def test_a_head_that_does_not_come_is_not_waited_for(impatient: str, before: bytes, drip: bytes) -> None:
    with connect(impatient, before) as slow:
        if before:
            assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        begun = time.monotonic()
        slow.sendall(drip)
        slow.settimeout(0.1)
        with contextlib.suppress(ConnectionError):  # until it is closed
            while time.monotonic() < begun + 10:  # a byte now and then does not help
                with contextlib.suppress(TimeoutError):
                    slow.sendall(b"a")
                    if slow.recv(1000) == b"":
                        break
        assert 0.2 < time.monotonic() - begun < 5  # the server began to wait before


def test_a_connection_is_used_again(impatient: str) -> None:
    with connect(impatient) as kept:
        for _ in range(3):
            kept.sendall(HEALTH)
            found = b""
            while not found.endswith(b'{"status":"ok"}'):
                found += kept.recv(1000)
                assert found
            assert found.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.05)


def test_an_answer_may_take_longer_than_a_head(impatient: str, slow: SlowEngine) -> None:
    with connect(impatient, completion(b'{"model": "slow", "prompt": "x", "max_tokens": 2}')) as client:
        time.sleep(0.8)
        slow.go.release(2)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
