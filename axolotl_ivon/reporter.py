"""How long work reports its progress and what the user should know."""

from __future__ import annotations

from collections.abc import Callable


class Reporter:
    """Gets the reports of long work. This one shows nothing; that of `ivon-post` draws bars."""

    def advance(self, doing: str, count: int, total: int) -> None:
        """Report that `count` more of `total` are done, from any thread; a `total` of 0 is an unknown one."""

    def begin(self, doing: str, total: int = 0) -> Callable[[int], None]:
        """Report that something begins, and return a function to report how many more of `total` are done."""
        self.advance(doing, 0, total)
        return lambda count: self.advance(doing, count, total)

    def describe(self, doing: str, text: str) -> None:
        """Show `text` in place of `doing`, a figure that changes meanwhile."""

    def say(self, text: str) -> None:
        """Report a result on the way, as a line of text."""

    def notify(self, message: str) -> None:
        """Report something that the user should know."""


class Stage(Reporter):
    """Show all work inside a stage as one thing with a total.

    What is said or notified passes through; what is described is dropped, since its bar is not shown.
    """

    def __init__(self, reporter: Reporter, doing: str, total: int, announced: bool = True) -> None:
        self._reporter = reporter
        self._count = reporter.begin(doing, total) if announced else lambda n: reporter.advance(doing, n, total)

    def advance(self, doing: str, count: int, total: int) -> None:
        """Count for the stage."""
        self._count(count)

    def say(self, text: str) -> None:
        """Pass it on."""
        self._reporter.say(text)

    def notify(self, message: str) -> None:
        """Pass it on."""
        self._reporter.notify(message)


SILENT = Reporter()
