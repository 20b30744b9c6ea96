"""The commands that work on adapter folders alone, with words in place of the folders."""

from __future__ import annotations

from pathlib import Path

WRITING: dict[str, tuple[object, ...]] = {
    "prune": ("prune", "ADAPTER", "-o", "OUT"),
    "temper": ("temper", "ADAPTER", "--tau", 2, "-o", "OUT"),
    "sample": ("sample", "ADAPTER", "-n", 2, "-o", "OUT"),
    "combine": ("combine", "ADAPTER", "OTHER", "-o", "OUT"),
    "merge": ("merge", "ADAPTER", "-o", "OUT"),
}
READING: dict[str, tuple[object, ...]] = {
    "info": ("info", "ADAPTER", "--json"),
    "check": ("check", "ADAPTER"),
    "diff": ("diff", "ADAPTER", "OTHER"),
}


def fill(words: tuple[object, ...], adapter: Path | str, other: Path | str = "", out: Path | str = "") -> list[str]:
    """Return the words of a command with the folders in place."""
    places = {"ADAPTER": adapter, "OTHER": other, "OUT": out}
    return [str(places.get(word, word)) if isinstance(word, str) else str(word) for word in words]
