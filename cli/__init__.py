"""`ivon-post`: what can be done with an adapter and its posterior after training.

One module per subcommand; each holds argument parsing, progress and rendering, and imports the library that
does the work (torch with it) inside the command, so that `ivon-post --help` starts at once.
"""

from __future__ import annotations

import functools
import re
import signal
import sys
from importlib import import_module
from typing import Any

import click

from . import _stdout

# The modules of the subcommands, in the order in which `--help` shows them.
_MODULES = (
    "info", "check", "fit", "prune", "temper", "sample", "merge", "combine", "diff",
    "eval", "sweep", "predict", "influence", "generate", "mbr", "serve", "report", "card",
)  # fmt: skip


class _Mistyped(click.ClickException):
    """A usage error without the three lines of usage."""

    exit_code = click.UsageError.exit_code


def _option(command: click.Command | None, parameter: str) -> str:
    """Return the option or argument of a command that gives a parameter of the library; the parameter if none does."""
    known = {param.name: param for param in command.params} if command else {}
    for name in (parameter, f"{parameter}s"):  # or what they take several of: taus, files
        if name in known:
            param = known[name]
            if isinstance(param, click.Option):
                return max(param.opts, key=len)
            return re.findall(r"\w+", param.metavar or parameter.upper())[-1]  # FILE of [LABEL=]FILE...
    option = f"--{parameter.replace('_', '-')}"  # --no-recommended of --recommended
    return option if any(option in param.secondary_opts for param in known.values()) else parameter


class _Group(click.Group):
    """A group that third parties add commands to, and whose user errors are one line on stderr."""

    _registered = False

    def _register(self) -> None:
        if not self._registered:
            from axolotl_ivon.errors import IVONError
            from axolotl_ivon.plugins import plugin_manager

            self._registered = True
            for name in _MODULES:
                self.add_command(import_module(f".{name}", __name__).command)
            try:
                plugin_manager().hook.register_commands(cli=self)
            except IVONError as error:  # the help asks outside of `invoke`
                raise click.ClickException(str(error)) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._register()
        return list(self.commands)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        self._register()
        return super().get_command(ctx, name)

    def invoke(self, ctx: click.Context) -> Any:
        from axolotl_ivon.errors import IVONError

        from ._progress import silence_libraries

        silence_libraries()
        try:
            return super().invoke(ctx)
        except IVONError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise click.ClickException(error.describe(functools.partial(_option, command))) from error
        except click.UsageError as error:
            path = (error.ctx or ctx).command_path
            raise _Mistyped(f"{error.format_message().rstrip('.')}. See '{path} --help'.") from error


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog='Shell completion: put eval "$(_IVON_POST_COMPLETE=bash_source ivon-post)" into ~/.bashrc; '
    "for other shells say zsh_source or fish_source.",
)
@click.version_option(package_name="axolotl-ivon", prog_name="ivon-post")
def cli() -> None:
    """Work on the posterior of an IVON-LoRA adapter: a PEFT folder with ivon_sigma.safetensors beside it."""


def main() -> None:
    """Run `ivon-post`."""
    # An interrupt and a termination unwind alike, so that nothing half written is left.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cli(prog_name="ivon-post")
    finally:
        _stdout.end()
