"""What is read from the responses of the servers behind this one, which anybody may have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..api.answers import LEAST_LOGPROB, Token
from .mixture import Candidate, coarse_entropies


def read_candidates(response: Mapping[str, Any], member: int) -> list[Candidate]:
    """Return the answers in a response of a member."""
    candidates = []
    for choice in response["choices"]:
        tokens, ids = read_tokens(choice.get("logprobs"), 0), choice.get("token_ids")
        finish = str(choice["finish_reason"])
        candidates.append(
            Candidate(
                text=read_text(choice),
                member=member,
                logprob=math.fsum(token.logprob for token in tokens) if tokens else -math.inf,
                finish=finish,
                generated=len(ids or tokens) or int(response["usage"]["completion_tokens"]) // len(response["choices"]),
                ids=None if ids is None else tuple(map(int, ids)),
                # A stop string is named there; a token that ends answers is not.
                ended=finish == "stop" and not isinstance(choice.get("stop_reason"), str),
                names=tuple(token.name for token in tokens),
            )
        )
    return candidates


def read_tokens(logprobs: Any, top: int) -> list[Token]:
    """Return the tokens in `logprobs`, of a chat or a completion, with the `top` likeliest in the place of each."""
    if not logprobs:
        return []
    if "content" in logprobs:
        rows = [
            (entry["token"], entry["logprob"], {t["token"]: t["logprob"] for t in entry.get("top_logprobs") or []})
            for entry in logprobs["content"] or []
        ]
    else:
        tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
        rows = list(zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True))
    tokens = []
    for name, logprob, others in rows:
        value, likeliest = _finite(logprob), _finite_values(others or {})
        entropy = coarse_entropies([likeliest])[0] if likeliest else 0.0
        shown = tuple(sorted(likeliest.items(), key=lambda item: -item[1])[:top])
        tokens.append(Token(-1, str(name), str(name), value, shown, entropy, 0.0))
    return tokens


def read_prompt_ids(response: Mapping[str, Any]) -> list[int] | None:
    """Return the prompt's tokens: vLLM has them in the response to a chat, and in the choice of a completion."""
    ids = response.get("prompt_token_ids") or response["choices"][0].get("prompt_token_ids")
    return None if ids is None else list(map(int, ids))


def read_text(choice: Mapping[str, Any]) -> str:
    """Return the text of a choice: of a chat, of its stream, or of a completion."""
    message = choice.get("message") or choice.get("delta")
    text = choice["text"] if message is None else message.get("content")
    if text is not None and not isinstance(text, str):
        raise TypeError
    return text or ""


def _finite(value: Any) -> float:
    return max(float(value), LEAST_LOGPROB)


def _finite_values(logprobs: Mapping[Any, Any]) -> dict[str, float]:
    return {str(name): _finite(value) for name, value in logprobs.items()}
