"""An engine that a test holds: it makes a token whenever the test lets it; and prompts without a tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from typing import Any

from axolotl_ivon.data.encode import ChatFormat
from axolotl_ivon.serving.api.answers import AnswerDelta, certainty
from axolotl_ivon.serving.api.prompts import PromptReader
from axolotl_ivon.serving.local.engine import GenerationRequest


class LetterReader(PromptReader):
    """Reads 1 for each letter or token, and 7 for each message of a chat."""

    def __init__(self) -> None:
        super().__init__(lambda: None, ChatFormat())

    def encode(self, prompt: Any, chat_template_kwargs: Any = None) -> Sequence[int]:
        return [7 if isinstance(part, dict) else 1 for part in prompt]


class SlowEngine:
    """What `serving.local.queue.Local` works with, without a model.

    Attributes:
        begun, ended: the requests, as they begin and end.
        steps: the number of tokens that were made.
        go: a semaphore that lets further tokens be made.
        failing: raised at the next token.
    """

    max_length = 512
    models = {"slow": slice(0, 1)}  # noqa: RUF012 - nobody changes it

    def __init__(self, tokens: int = 0) -> None:
        self.begun: list[GenerationRequest] = []
        self.ended: list[GenerationRequest] = []
        self.steps = 0
        self.go = threading.Semaphore(tokens)
        self.failing: Exception | None = None

    def check(self, ids: tuple[int, ...]) -> None:
        pass

    def deltas(self, request: GenerationRequest) -> Generator[list[AnswerDelta], None, None]:
        self.begun.append(request)
        try:
            for number in range(request.max_tokens):
                assert self.go.acquire(timeout=120)
                if self.failing:
                    raise self.failing
                self.steps += 1
                last = number + 1 == request.max_tokens
                ivon = certainty(0.5, 0.0, 0.0, 1) if last else None
                yield [AnswerDelta(0, "x", (), "length" if last else None, ivon, 1)]
        finally:
            self.ended.append(request)
