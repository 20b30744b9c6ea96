"""`ivon-post` in the process of the tests."""

from __future__ import annotations

import json
from typing import Any


class Cli:
    """`ivon-post` in this process."""

    def __call__(self, *arguments: object) -> str:
        """Run a command that must succeed, and return its stdout."""
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: object) -> Any:
        """Run a command with --json, and return the document that is all of its stdout."""
        return json.loads(self(*arguments, "--json"))

    def error(self, *arguments: object) -> str:
        """Run a command that must fail as a user's mistake does: status 1 and one line, which is returned."""
        result = self.run(*arguments)
        assert result.exit_code == 1, result.output
        assert not result.stdout
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        return lines[0]

    def run(self, *arguments: object) -> Any:
        from click.testing import CliRunner

        from ivon_post import cli

        return CliRunner().invoke(cli, [str(argument) for argument in arguments])
