"""The `openai` client for servers that serve draws, and its errors in one line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, one_line, param_ref

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

_LONGEST_MESSAGE = 300  # characters of what a server says


def import_openai() -> Any:
    """Import the package `openai`, which takes a second and comes with an extra.

    Raises:
        IVONError: it is not installed.
    """
    try:
        import openai
    except ImportError:
        raise IVONError(
            f"{param_ref('endpoint')} needs the package openai: pip install 'axolotl-ivon[serve]'"
        ) from None
    return openai


def base_url(url: str) -> str:
    """Return the address under which an OpenAI-compatible server has its paths: `url`, ending in /v1."""
    root = url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


def make_client(
    url: str, *, timeout: float, connect_timeout: float = 10.0, retries: int = 0, http_client: Any = None
) -> AsyncOpenAI:
    """Make a client for one server; use it in a single event loop, and close it there.

    The environment variable OPENAI_API_KEY, if set, is sent along.

    Args:
        url: of the server, with or without /v1.
        timeout, connect_timeout: seconds that a request, and a connection, may take.
        retries: how many more times a request is sent that failed in passing: no connection, no answer in time,
            status 408, 409, 429 or 5xx. Waits grow from half a second to 8, or are those of the server's Retry-After.
        http_client: the transport, in place of the client's own.

    Raises:
        IVONError: `openai` is not installed.
    """
    openai = import_openai()
    limits = openai.Timeout(timeout, connect=min(timeout, connect_timeout), pool=None)
    # The client insists on a key; servers without keys, vLLM among them, ignore it.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client: AsyncOpenAI = openai.AsyncOpenAI(
        base_url=base_url(url), api_key=key, timeout=limits, max_retries=retries, http_client=http_client
    )
    return client


def explain(error: OpenAIError) -> str:
    """Return an error of the client in words: what the server answers, or why there is no answer.

    "/v1/completions answers 404: The model does not exist", or "Connection refused".
    """
    status = getattr(error, "status_code", None)
    if status is not None:
        body: Any = getattr(error, "body", None)
        message = body.get("message", body) if isinstance(body, dict) else body
        text = " ".join(str(message or "nothing").split())[:_LONGEST_MESSAGE]
        return f"{error.request.url.path} answers {status}: {text}"  # type: ignore[attr-defined]
    cause = error.__cause__ or error
    return one_line(cause) or type(cause).__name__
