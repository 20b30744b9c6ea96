"""The socket and the server on it: who can reach it, and connections on which nothing comes."""

from __future__ import annotations

import socket
import time

import pytest
from served import connect, serving
from slow_steps import SlowSteps

from axolotl_ivon import IVONError
from axolotl_ivon.serving.api import http
from axolotl_ivon.serving.api.http import bind, is_loopback
from axolotl_ivon.serving.backend import Limits, Local

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def slow_backend() -> Local:
    return Local(SlowSteps(), lambda messages: [1], lambda text: [1], Limits())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("", False),
        ("::", False),
        ("192.168.0.7", False),
        ("localhost.example.org", False),
    ],
)
def test_what_is_reached_from_here_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


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
def test_a_head_that_does_not_come_is_not_waited_for(
    before: bytes, drip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEADER_TIMEOUT", 0.4)
    with serving(slow_backend) as url, connect(url) as slow:
        if before:
            slow.sendall(before)
            assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        begun = time.monotonic()
        slow.sendall(drip)
        slow.settimeout(0.1)
        while time.monotonic() < begun + 10:  # a byte now and then does not help
            try:
                slow.sendall(b"a")
                if slow.recv(1000) == b"":
                    break
            except TimeoutError:
                pass
            except ConnectionError:
                break
        assert 0.3 < time.monotonic() - begun < 5


def test_a_connection_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_TIMEOUT", 0.3)
    with serving(slow_backend) as url, connect(url) as kept:
        for _ in range(3):
            kept.sendall(HEALTH)
            found = b""
            while not found.endswith(b'{"status":"ok"}'):
                found += kept.recv(1000)
                assert found
            assert found.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.05)


def test_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_TIMEOUT", 0.1)
    steps = SlowSteps()
    body = b'{"model": "slow", "prompt": "x", "max_tokens": 2}'
    with serving(lambda: Local(steps, lambda m: [1], lambda t: [1], Limits())) as url, connect(url) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        time.sleep(0.4)
        steps.go.release(2)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
