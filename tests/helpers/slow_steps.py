"""An engine that a test holds: it gives a token whenever it is let go on."""

from __future__ import annotations

import threading
from collections.abc import Generator

from axolotl_ivon.serving.pieces import Ask, Piece


class SlowSteps:
    """What `serving.backend.Local` works with, without a model.

    Attributes:
        begun: what was asked for, as it begins.
        steps: how many tokens were made in all.
        go: how many may be made: a semaphore.
        failing: raised at the next token.
    """

    longest = 512
    models = {"slow": slice(0, 1)}  # noqa: RUF012 - nobody changes it

    def __init__(self, tokens: int = 0) -> None:
        self.begun: list[Ask] = []
        self.ended: list[Ask] = []
        self.steps = 0
        self.go = threading.Semaphore(tokens)
        self.failing: Exception | None = None

    def check(self, ids: tuple[int, ...]) -> None:
        pass

    def pieces(self, ask: Ask) -> Generator[list[Piece], None, None]:
        self.begun.append(ask)
        try:
            for number in range(ask.max_tokens):
                assert self.go.acquire(timeout=30)
                if self.failing:
                    raise self.failing
                self.steps += 1
                last = number + 1 == ask.max_tokens
                facts = {"confidence": 0.5, "expected_entropy": 0.0, "mutual_information": 0.0, "members": 1}
                yield [Piece(0, "x", (), "length" if last else None, facts if last else None, 1)]
        finally:
            self.ended.append(ask)
