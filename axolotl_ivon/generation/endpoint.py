"""Generation on a server that serves the draws.

Any server with OpenAI's interface will do that serves every member under its name (sample-0000, …) and takes prompts as
token ids: `GET /v1/models` and `POST /v1/completions`. The environment variable OPENAI_API_KEY, if set, is sent along.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import httpx

from ..data.encode import Prompt
from ..errors import IVONError, one_line, param_ref
from .plan import Output, Plan, random_bits

_T = TypeVar("_T")
_RETRIED = {408, 429, 500, 502, 503, 504}
_ATTEMPTS = 6
_BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one
_LONGEST_WAIT = 60.0  # seconds, whatever the server's Retry-After says
_CONNECT_TIMEOUT = 10.0


class EndpointEngine:
    """Generates on an OpenAI-compatible server; see `plan.Engine`.

    A request asks one member for all its outputs of one prompt; `concurrency` of them run at a time. A request that
    fails in passing (no connection, no answer in `timeout` seconds, status 408, 429 or 5xx) is repeated, later each
    time. The server's log-probabilities are taken as they come: with vLLM those of the untempered model.

    Args:
        members: the names under which the plan's members are served.

    Raises:
        IVONError: no server answers, or it does not serve every member.
    """

    def __init__(
        self, url: str, members: Sequence[str], plan: Plan, *, concurrency: int = 32, timeout: float = 600.0
    ) -> None:
        self._named, self._members, self._plan = f"{param_ref('endpoint')} {url}", members, plan
        self._concurrency = concurrency
        root = url.rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        self._options: dict[str, Any] = {
            "base_url": root if root.endswith("/v1") else f"{root}/v1",
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT), pool=None),
        }
        self._check()

    def _check(self) -> None:
        """Raise IVONError unless the server is there and serves every member."""
        try:
            with httpx.Client(**self._options) as client:
                response = client.get("/models")
        except (httpx.RequestError, httpx.InvalidURL, ValueError) as error:
            reason = one_line(error) or type(error).__name__
            raise IVONError(
                f"{self._named}: no server answers there ({reason}); start it with serve.sh of the "
                "ensemble, or name another address"
            ) from None
        self._refuse(response)
        served = _field(response, lambda body: [str(model["id"]) for model in body["data"]], self._named)
        for name in self._members:
            if name not in served:
                raise IVONError(
                    f"{self._named} does not serve {name}, but {', '.join(served[:8]) or 'nothing'}"
                    f"{', …' if len(served) > 8 else ''}; start it with serve.sh of the ensemble"
                )

    def _refuse(self, response: httpx.Response) -> None:
        """Raise IVONError if the server refuses the request."""
        if response.status_code != 200:
            text = " ".join(response.text.split())[:300]
            raise IVONError(f"{self._named}: {response.request.url.path} answers {response.status_code}: {text}")

    def outputs(
        self, prompts: Sequence[Prompt], start: int = 0, count: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[list[Output]]:
        """Yield the outputs for each of `prompts[start:]`; see `Engine`.

        Raises:
            IVONError: the server refuses a request, keeps failing, or answers something else than completions.
        """
        loop = asyncio.new_event_loop()
        waiting: deque[list[asyncio.Task[list[Output]]]] = deque()
        client = httpx.AsyncClient(**self._options)
        gate = asyncio.Semaphore(self._concurrency)
        todo = deque(prompts[start:])
        try:
            while todo or waiting:
                # Enough to keep the server busy while the first prompt's last request is waited for.
                while todo and len(waiting) * len(self._members) < 2 * self._concurrency:
                    prompt = todo.popleft()
                    asked = [self._ask(client, gate, prompt, k, count) for k in range(len(self._members))]
                    waiting.append([loop.create_task(request) for request in asked])
                found = loop.run_until_complete(asyncio.gather(*waiting[0]))
                waiting.popleft()
                yield [output for own in found for output in own]
        finally:
            # Those that failed too are waited for as well: asyncio prints an exception that nobody looked at.
            left = [task for own in waiting for task in own]
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(client.aclose())
            loop.close()

    async def _ask(
        self,
        client: httpx.AsyncClient,
        gate: asyncio.Semaphore,
        prompt: Prompt,
        member: int,
        count: Callable[[int], None],
    ) -> list[Output]:
        plan = self._plan
        body = {
            "model": self._members[member],
            "prompt": prompt.ids,
            "n": plan.distinct,
            "temperature": plan.temperature,
            "top_p": plan.top_p,
            "max_tokens": plan.max_tokens,
            "seed": int(random_bits(plan, prompt, member).random_raw() >> 33),
            "logprobs": 1,
            **({"stop": list(plan.stop)} if plan.stop else {}),
        }
        async with gate:
            response = await self._post(client, body)
        found = _field(response, lambda body: [_output(choice, member) for choice in body["choices"]], self._named)
        if len(found) != plan.distinct:
            raise IVONError(
                f"{self._named}: {len(found)} outputs where {plan.distinct} were asked for; use a server "
                f"that knows n, or {param_ref('per_model')} 1"
            )
        count(sum(output.tokens for output in found))
        return [found[j % plan.distinct] for j in range(plan.per_member)]

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        problem = ""
        for attempt in range(_ATTEMPTS):
            wait = _BACKOFF * 2**attempt
            try:
                response = await client.post("/completions", json=body)
                if response.status_code not in _RETRIED:
                    self._refuse(response)
                    return response
                problem = f"status {response.status_code}"
                after = response.headers.get("Retry-After", "")
                wait = min(_LONGEST_WAIT, float(after)) if after.isdecimal() else wait
            except httpx.RequestError as error:
                problem = one_line(error) or type(error).__name__
            if attempt + 1 < _ATTEMPTS:
                await asyncio.sleep(wait)
        raise IVONError(
            f"{self._named}: {_ATTEMPTS} attempts failed, the last with {problem}; what is done is kept: "
            "run the same command again when the server is well"
        )


def _field(response: httpx.Response, take: Callable[[Any], _T], named: str) -> _T:
    """Return what `take` finds in a response of the server `named`, which anybody may have written.

    Raises:
        IVONError: it is not there.
    """
    try:
        return take(response.json())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        path = response.request.url.path
        raise IVONError(f"{named}: {path} does not answer as OpenAI's interface does") from None


def _output(choice: dict[str, Any], member: int) -> Output:
    text = choice["text"]
    if not isinstance(text, str):
        raise TypeError
    held = choice.get("logprobs")
    if not held or held.get("token_logprobs") is None:
        return Output(text, member, None, 0)
    logprobs = [float(value) for value in held["token_logprobs"]]
    if not all(map(math.isfinite, logprobs)):
        raise ValueError
    return Output(text, member, round(sum(logprobs), 6), len(logprobs))
