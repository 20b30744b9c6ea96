"""A reporter that remembers."""

from __future__ import annotations

from axolotl_ivon.reporter import Reporter


class Heard(Reporter):
    """What long work has told of itself."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []
        self.counts: dict[str, list[tuple[int, int]]] = {}  # (count, total) of what was done, by what was going on

    def advance(self, doing: str, count: int, total: int) -> None:
        self.counts.setdefault(doing, []).append((count, total))

    def say(self, text: str) -> None:
        self.lines.append(text)

    def notify(self, message: str) -> None:
        self.notes.append(message)
