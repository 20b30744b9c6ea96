"""Generation on a server that serves the draws, through the package `openai`, which comes with the extra `serve`.

Any server with OpenAI's interface will do that serves every member under its name (sample-0000, …) and takes prompts as
token ids: `GET /v1/models` and `POST /v1/completions`. The environment variable OPENAI_API_KEY, if set, is sent along.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data.encode import Prompt
from ..errors import IVONError, import_optional, one_line, param_ref
from .plan import Output, Plan, random_bits

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

_RETRIES = 5
_CONNECT_TIMEOUT = 10.0  # seconds
_MALFORMED = (ValueError, TypeError, AttributeError, RecursionError)  # what another answer than OpenAI's leads to


def base_url(url: str) -> str:
    """Return the address under which an OpenAI-compatible server has its paths: `url`, ending in /v1."""
    root = url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


class EndpointEngine:
    """Generates on an OpenAI-compatible server; see `plan.Engine`.

    A request asks one member for all its outputs of one prompt; `concurrency` of them run at a time. A request that
    fails in passing (no connection, no answer in time, status 408, 409, 429 or 5xx) is repeated, later each time. The
    server's log-probabilities are taken as they come: with vLLM those of the untempered model.

    Args:
        url: the address, with or without /v1.
        members: the names under which the plan's members are served.
        timeout: seconds that a request may take.

    Raises IVONError if `openai` is not installed, no server answers, or it does not serve every member.
    """

    def __init__(
        self, url: str, members: Sequence[str], plan: Plan, *, concurrency: int = 32, timeout: float = 600.0
    ) -> None:
        self._named, self._url = f"{param_ref('endpoint')} {url}", url
        self._openai = import_optional("openai", param_ref("endpoint"), "openai", "'axolotl-ivon[serve]'")
        self._members, self._plan = members, plan
        self._concurrency, self._timeout = concurrency, timeout
        asyncio.run(self._check())

    def _client(self, retries: int) -> AsyncOpenAI:
        """Return a client, which is used in one event loop and closed there."""
        return self._openai.AsyncOpenAI(  # type: ignore[no-any-return]
            base_url=base_url(self._url),
            # The client insists on a key; a server without one, as vLLM is by default, ignores it.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self._openai.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_TIMEOUT), pool=None),
            max_retries=retries,
        )

    async def _check(self) -> None:
        try:
            async with self._client(retries=0) as client:
                served = [str(model.id) for model in (await client.models.list()).data]
        except self._openai.APIStatusError as error:
            raise IVONError(f"{self._named}: {_explain(error)}") from None
        except self._openai.OpenAIError as error:
            raise IVONError(
                f"{self._named}: no server answers there ({_explain(error)}); start it with serve.sh of the ensemble, "
                "or name another address"
            ) from None
        except _MALFORMED:
            raise self._malformed("models") from None
        if lacking := [name for name in self._members if name not in served]:
            raise IVONError(
                f"{self._named} does not serve {lacking[0]}, but {', '.join(served[:8]) or 'nothing'}"
                f"{', …' if len(served) > 8 else ''}; start it with serve.sh of the ensemble"
            )

    def outputs(self, prompts: Sequence[Prompt], start: int = 0) -> Iterator[list[Output]]:
        """Yield the outputs for each of `prompts[start:]`; see `Engine`."""
        loop, client, gate = asyncio.new_event_loop(), self._client(_RETRIES), asyncio.Semaphore(self._concurrency)
        waiting: deque[list[asyncio.Task[list[Output]]]] = deque()
        todo = deque(prompts[start:])
        try:
            while todo or waiting:
                # Enough to keep the server busy while the first prompt's last request is waited for.
                while todo and len(waiting) * len(self._members) < 2 * self._concurrency:
                    prompt = todo.popleft()
                    requests = [self._ask(client, gate, prompt, member) for member in range(len(self._members))]
                    waiting.append([loop.create_task(request) for request in requests])
                by_member = loop.run_until_complete(asyncio.gather(*waiting[0]))
                waiting.popleft()
                copies = range(self._plan.per_member)
                yield [outputs[copy % len(outputs)] for outputs in by_member for copy in copies]
        finally:
            # Those that failed too are waited for as well: asyncio prints an exception that nobody looked at.
            left = [task for tasks in waiting for task in tasks]
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(client.close())
            loop.close()

    async def _ask(self, client: AsyncOpenAI, gate: asyncio.Semaphore, prompt: Prompt, member: int) -> list[Output]:
        """Return one member's different outputs for a prompt."""
        plan = self._plan
        try:
            async with gate:
                completion = await client.completions.create(
                    model=self._members[member],
                    prompt=prompt.ids,
                    n=plan.distinct,
                    temperature=plan.temperature,
                    top_p=plan.top_p,
                    max_tokens=plan.max_tokens,
                    seed=int(random_bits(plan, prompt, member).random_raw() >> 33),
                    logprobs=1,
                    stop=list(plan.stop) or self._openai.NOT_GIVEN,
                )
            outputs = [_output(choice, member) for choice in completion.choices]
        except self._openai.OpenAIError as error:
            status = getattr(error, "status_code", 500)
            if status < 500 and status not in (408, 409, 429):
                raise IVONError(f"{self._named}: {_explain(error)}") from None
            raise IVONError(
                f"{self._named}: {_RETRIES + 1} attempts failed, the last with {_explain(error)}; what is done is "
                "kept: run the same command again when the server is well"
            ) from None
        except _MALFORMED:
            raise self._malformed("completions") from None
        if len(outputs) != plan.distinct:
            raise IVONError(
                f"{self._named}: {len(outputs)} outputs where {plan.distinct} were asked for; use a server "
                f"that knows n, or {param_ref('per_model')} 1"
            )
        return outputs

    def _malformed(self, path: str) -> IVONError:
        return IVONError(f"{self._named}: /v1/{path} does not answer as OpenAI's interface does")


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
