"""What long work tells of itself: how far it is, and what is worth knowing."""

from __future__ import annotations

import functools
from collections.abc import Callable


class Reporter:
    """Hear how long work goes. This one says nothing; that of `ivon-post` draws bars."""

    def advance(self, doing: str, count: int, total: int) -> None:
        """Hear that `count` more of `total` are done (0: nobody knows how many), from any thread."""

    def begin(self, doing: str, total: int = 0) -> Callable[[int], None]:
        """Hear that something begins, and return the function that is told how many more of `total` are done."""
        self.advance(doing, 0, total)
        return functools.partial(self._advanced, doing, total)

    def _advanced(self, doing: str, total: int, count: int) -> None:
        self.advance(doing, count, total)

    def describe(self, doing: str, text: str) -> None:
        """Show `text` in place of `doing`: a figure that changes while it goes on."""

    def say(self, text: str) -> None:
        """Hear a result on the way, as a line of text."""

    def notify(self, message: str) -> None:
        """Hear of something that the user should know."""


SILENT = Reporter()
