"""What the engine is asked for: one prompt of a request, checked."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ..api.protocol import ApiError, ChatRequest, Request

_COMPLETION_TOKENS = 16  # of a completion whose request names no maximum, as OpenAI has it


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how to generate its answers.

    Attributes:
        model: the served name, one of the engine's.
        ids: the prompt's tokens.
        n: the number of answers.
        max_tokens: of each, the token that ends it included.
        top: the number of likeliest tokens to return at each place; None: no tokens are returned.
        seed: of the answers.
    """

    model: str
    ids: tuple[int, ...]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top: int | None = None
    seed: int = 0


def generation_requests(
    request: Request, prompts: Sequence[tuple[int, ...]], max_tokens: int, max_length: int | None
) -> list[GenerationRequest]:
    """Return a `GenerationRequest` for each prompt of a request.

    Args:
        max_tokens: of a chat whose request names no maximum.
        max_length: the most tokens that the model takes; None if it has no limit.

    Raises:
        ApiError: a prompt and its answer would be longer than the model takes.
    """
    parts = []
    for number, ids in enumerate(prompts):
        room = max_tokens if max_length is None else max_length - len(ids)
        default = min(max_tokens, room) if isinstance(request, ChatRequest) else _COMPLETION_TOKENS
        wanted = max(request.max_tokens or default, 1)
        if room < wanted:
            message = (
                f"the prompt has {len(ids)} tokens and max_tokens is {wanted}; the model takes {max_length} together"
            )
            raise ApiError(400, message, param=request.prompt_field, code="context_length_exceeded")
        parts.append(
            GenerationRequest(
                model=request.model,
                ids=ids,
                n=request.n,
                max_tokens=wanted,
                temperature=request.temperature,
                top_p=request.top_p,
                stop=tuple(request.stop),
                top=request.top,
                seed=secrets.randbits(63) if request.seed is None else request.seed + number,
            )
        )
    return parts
