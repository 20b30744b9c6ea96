"""`ivon-post` in the process of the tests, and the commands that work on adapter folders alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# With words in place of the folders.
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


MAIN = "import ivon_post; ivon_post.main()"
PROCESS = [sys.executable, "-c", MAIN]


def process(*words: object, program: str = MAIN, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `ivon-post`, or another program, as a process of its own, and note what it prints."""
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


class Cli:
    """`ivon-post` in this process."""

    def __call__(self, *arguments: object) -> str:
        """Run a command that must succeed, and return its stdout."""
        return self.done(*arguments).stdout

    def done(self, *arguments: object, stdin: str | None = None) -> Any:
        """Run a command that must succeed, and return click's result."""
        result = self.run(*arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result

    def json(self, *arguments: object) -> Any:
        """Run a command with --json, and return the document that is all of its stdout."""
        return json.loads(self(*arguments, "--json"))

    def error(self, *arguments: object, stdin: bytes | None = None) -> str:
        """Run a command that must fail as a user's mistake does: status 1 and one line, which is returned."""
        result = self.run(*arguments, stdin=stdin)
        assert result.exit_code == 1, result.output
        assert not result.stdout
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        return lines[0]

    def run(self, *arguments: object, stdin: str | bytes | None = None) -> Any:
        from click.testing import CliRunner

        from ivon_post import cli

        return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def fill(words: tuple[object, ...], adapter: Path | str, other: Path | str = "", out: Path | str = "") -> list[str]:
    """Return the words of a command with the folders in place."""
    places = {"ADAPTER": adapter, "OTHER": other, "OUT": out}
    return [str(places.get(word, word)) if isinstance(word, str) else str(word) for word in words]


def snapshot(folder: Path) -> dict[str, object]:
    """Return what is below a folder: content, or what a link names, or what kind of thing it is."""

    def content(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.lstat().st_mode

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}
