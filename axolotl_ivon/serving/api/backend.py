"""What the server asks for answers: a model in memory (`local.queue`), or servers behind it (`proxy.proxy`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field

from .answers import AnswerDelta
from .prompts import PromptReader
from .protocol import ApiError, ChatRequest, Request

Deltas = AsyncGenerator[AnswerDelta, None]


@dataclass(frozen=True)
class Limits:
    """What requests may take."""

    max_queue: int = 32  # requests that may wait; further ones are refused with status 429
    max_tokens: int = 2048  # of an answer, and of a chat whose request names no maximum
    timeout: float = 600.0  # seconds for the answers to a request, waiting included

    def check(self, request: Request) -> None:
        """Raise ApiError if a request asks for more tokens than an answer may have."""
        if request.max_tokens is not None and request.max_tokens > self.max_tokens:
            message = f"max_tokens {request.max_tokens}: this server gives at most {self.max_tokens}"
            raise ApiError(400, message, param="max_tokens")

    def most_tokens(self, request: Request) -> int:
        """Return the most tokens of an answer; a text whose request names no maximum has 16, as OpenAI has it."""
        default = self.max_tokens if isinstance(request, ChatRequest) else min(16, self.max_tokens)
        return request.max_tokens or default


def queue_full(requests: str) -> ApiError:
    """Return the refusal of a request that finds too many `requests` before it."""
    return ApiError(429, f"{requests} already; try again later", code="queue_full", headers={"Retry-After": "1"})


@dataclass
class AnswerStream:
    """The answers to one request, as they come."""

    prompt_tokens: int  # of all prompts
    choices: int  # the number of answers
    deltas: Deltas = field(init=False)  # of all answers, in any order; closing ends the work
    generated: int | None = None  # tokens of all answers, known after the last part; None: the sum over the parts


class Backend(ABC):
    """Answers the requests of a server; `models` are the served names."""

    models: Collection[str]

    def __init__(self, prompts: PromptReader, limits: Limits) -> None:
        self.prompts, self.limits = prompts, limits

    @abstractmethod
    async def answer(self, request: Request) -> AnswerStream:
        """Begin to answer a request for one of `models`; this and the deltas raise ApiError if it is refused."""

    @abstractmethod
    def gauges(self) -> Mapping[str, float]:
        """Return current values to monitor, by name."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything, after all answers."""
