"""Generation on a server that serves the draws, through the package `openai`, which comes with the extra `serve`.

Any server with OpenAI's interface will do that serves every member under its name (sample-0000, …) and takes prompts as
token ids: `GET /v1/models` and `POST /v1/completions`. The environment variable OPENAI_API_KEY, if set, is sent along.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..data.encode import Prompt
from ..errors import IVONError, import_optional, one_line, param_ref
from .plan import Output, Plan, random_bits

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

Result = TypeVar("Result")
_RETRIES = 5
_CONNECT_TIMEOUT = 10.0  # seconds
# What reading another answer than OpenAI's leads to.
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, RecursionError)


def base_url(url: str) -> str:
    """Return the address under which an OpenAI-compatible server has its paths: `url`, ending in /v1."""
    root = url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


class Endpoint:
    """An OpenAI-compatible server.

    A request that fails in passing (no connection, no answer in time, status 408, 409, 429 or 5xx) is repeated, later
    each time.

    Args:
        url: the address, with or without /v1.
        timeout: seconds that a request may take.
        done: what a message says of the work so far when the server fails.

    Attributes:
        name: what messages call it.

    Raises IVONError if `openai` is not installed.
    """

    def __init__(self, url: str, timeout: float = 600.0, done: str = "") -> None:
        self._done = done
        self.name, self._url, self._timeout = f"{param_ref('endpoint')} {url}", url, timeout
        self._openai = import_optional("openai", param_ref("endpoint"), "openai", "'axolotl-ivon[serve]'")

    def client(self, retries: int = _RETRIES) -> AsyncOpenAI:
        """Return a client, which is used in one event loop and closed there."""
        return self._openai.AsyncOpenAI(  # type: ignore[no-any-return]
            base_url=base_url(self._url),
            # The client insists on a key; a server without one, as vLLM is by default, ignores it.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self._openai.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_TIMEOUT), pool=None),
            max_retries=retries,
        )

    def models(self, members: Sequence[str]) -> dict[str, Any]:
        """Return what the server serves, by name; raise IVONError if it does not answer, or lacks a member."""

        async def listed() -> dict[str, Any]:
            async with self.client(retries=0) as client:
                return {str(model.id): model for model in (await client.models.list()).data}

        try:
            served = asyncio.run(listed())
        except self._openai.APIStatusError as error:
            raise IVONError(f"{self.name}: {_explain(error)}") from None
        except self._openai.OpenAIError as error:
            raise IVONError(
                f"{self.name}: no server answers there ({_explain(error)}); start it with serve.sh of the ensemble, "
                "or name another address"
            ) from None
        except MALFORMED:
            raise self.malformed("models") from None
        if lacking := [name for name in members if name not in served]:
            raise IVONError(
                f"{self.name} does not serve {lacking[0]}, but {', '.join([*served][:8]) or 'nothing'}"
                f"{', …' if len(served) > 8 else ''}; start it with serve.sh of the ensemble"
            )
        return served

    async def complete(self, client: AsyncOpenAI, read: Callable[[Any], Result], **body: Any) -> Result:
        """Return what `read` makes of the choices of a completion; raise IVONError if the server gives none."""
        try:
            return read((await client.completions.create(**body)).choices)
        except self._openai.OpenAIError as error:
            status = getattr(error, "status_code", 500)
            if status < 500 and status not in (408, 409, 429):
                raise IVONError(f"{self.name}: {_explain(error)}") from None
            raise IVONError(
                f"{self.name}: {_RETRIES + 1} attempts failed, the last with {_explain(error)}; {self._done}run the "
                "same command again when the server is well"
            ) from None
        except MALFORMED:
            raise self.malformed("completions") from None

    def malformed(self, path: str) -> IVONError:
        """Return the error of an answer that is none of OpenAI's interface."""
        return IVONError(f"{self.name}: /v1/{path} does not answer as OpenAI's interface does")


class EndpointEngine:
    """Generates on an OpenAI-compatible server; see `plan.Engine`.

    A request asks one member for all its outputs of one prompt; `concurrency` of them run at a time. The server's
    log-probabilities are taken as they come: with vLLM those of the untempered model.

    Args:
        url, timeout: see `Endpoint`.
        members: the names under which the plan's members are served.

    Raises IVONError if `openai` is not installed, no server answers, or it does not serve every member.
    """

    def __init__(
        self, url: str, members: Sequence[str], plan: Plan, *, concurrency: int = 32, timeout: float = 600.0
    ) -> None:
        self._endpoint = Endpoint(url, timeout, "what is done is kept: ")
        self._members, self._plan, self._concurrency = members, plan, concurrency
        self._endpoint.models(members)

    def outputs(self, prompts: Sequence[Prompt], start: int = 0) -> Iterator[list[Output]]:
        """Yield the outputs for each of `prompts[start:]`; see `Engine`."""
        client, gate = self._endpoint.client(), asyncio.Semaphore(self._concurrency)

        async def asked(prompt: Prompt) -> list[list[Output]]:
            return await together([self._ask(client, gate, prompt, member) for member in range(len(self._members))])

        # Enough to keep the server busy while the first prompt's last request is waited for.
        ahead = -(-2 * self._concurrency // len(self._members))
        copies = range(self._plan.per_member)
        with contextlib.closing(in_order(map(asked, prompts[start:]), ahead, [client])) as answered:
            for by_member in answered:
                yield [outputs[copy % len(outputs)] for outputs in by_member for copy in copies]

    async def _ask(self, client: AsyncOpenAI, gate: asyncio.Semaphore, prompt: Prompt, member: int) -> list[Output]:
        """Return one member's different outputs for a prompt."""
        plan = self._plan
        async with gate:
            outputs = await self._endpoint.complete(
                client,
                lambda choices: [_output(choice, member) for choice in choices],
                model=self._members[member],
                prompt=prompt.ids,
                n=plan.distinct,
                temperature=plan.temperature,
                top_p=plan.top_p,
                max_tokens=plan.max_tokens,
                seed=int(random_bits(plan, prompt, member).random_raw() >> 33),
                logprobs=1,
                **({"stop": list(plan.stop)} if plan.stop else {}),
            )
        if len(outputs) != plan.distinct:
            raise IVONError(
                f"{self._endpoint.name}: {len(outputs)} outputs where {plan.distinct} were asked for; use a server "
                f"that knows n, or {param_ref('per_model')} 1"
            )
        return outputs


def in_order(
    requests: Iterator[Coroutine[Any, Any, Result]], ahead: int, clients: Sequence[AsyncOpenAI]
) -> Generator[Result, None, None]:
    """Yield the results of requests in their order, `ahead` of them at work; then close the clients."""
    loop, waiting = asyncio.new_event_loop(), deque[asyncio.Task[Result]]()
    try:
        while True:
            waiting.extend(map(loop.create_task, itertools.islice(requests, max(0, ahead - len(waiting)))))
            if not waiting:
                return
            yield loop.run_until_complete(waiting[0])
            waiting.popleft()
    finally:
        loop.run_until_complete(cancel_all(waiting))
        for client in clients:
            loop.run_until_complete(client.close())
        loop.close()


async def together(requests: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Return the results of all; when one fails, or nobody waits any more, the others are cancelled."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait until they have ended; asyncio prints an exception that nobody looked at."""
    for task in (tasks := list(tasks)):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _output(choice: Any, member: int) -> Output:
    """Return a choice of a completion, in which anything may stand."""
    if not isinstance(choice.text, str):
        raise TypeError
    if choice.logprobs is None or choice.logprobs.token_logprobs is None:
        return Output(choice.text, member, None, 0)
    logprobs = [float(value) for value in choice.logprobs.token_logprobs]
    if not all(map(math.isfinite, logprobs)):
        raise ValueError
    return Output(choice.text, member, round(sum(logprobs), 6), len(logprobs))


def _explain(error: OpenAIError) -> str:
    """Return in words what the server answers, or why there is no answer."""
    status, body = getattr(error, "status_code", None), getattr(error, "body", None)
    if status is None:
        cause = error.__cause__ or error
        return one_line(cause) or type(cause).__name__
    message = body.get("message", body) if isinstance(body, dict) else body
    text = " ".join(str(message or "nothing").split())[:300]
    return f"{error.request.url.path} answers {status}: {text}"  # type: ignore[attr-defined]
