"""The error for users: one line that names what is wrong and how to mend it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

_LONGEST = 2000
# Around the name of a parameter in a message; private-use characters, which no message has otherwise.
_BEGIN, _END = "\ue000", "\ue001"
_NAMED = re.compile(f"{_BEGIN}(\\w+){_END}")


def printable(text: str) -> str:
    """Return `text` with everything escaped that a terminal would obey, line breaks included."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks."""
    return " ".join(str(error).split())


def param_ref(name: str) -> str:
    """Return the name of a parameter for the message of an `IVONError`.

    Each caller shows its own name for it: Python `per_model`, `ivon-post` `--per-model`, the axolotl plugin the key of
    the YAML.
    """
    return f"{_BEGIN}{name}{_END}"


class IVONError(Exception):
    """A wrong input, in one line that names the key, the value and the fix.

    `ivon-post` prints the line and exits with status 1; library users catch it like any other exception.

    Attributes:
        parameter: the first parameter that the message names (see `param_ref`), or None.
    """

    def __init__(self, message: str) -> None:
        parts = _NAMED.split(message)  # every other one is a name
        parts[::2] = [printable(part) for part in parts[::2]]
        line = "".join(f"{_BEGIN}{part}{_END}" if i % 2 else part for i, part in enumerate(parts))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        self._line = line
        self.parameter: str | None = parts[1] if len(parts) > 1 else None
        super().__init__(self.describe(str))

    def describe(self, name: Callable[[str], str]) -> str:
        """Return the message with each parameter's name replaced by `name(parameter)`, its option for example."""
        return _NAMED.sub(lambda match: name(match[1]), self._line).replace(_BEGIN, "").replace(_END, "")


def import_optional(module: str, needed_by: str, package: str, install: str | None = None) -> Any:
    """Return a module of an optional package.

    Raises:
        IVONError: it is not installed; `install` is what pip takes, the package by default.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise IVONError(f"{needed_by} needs the package {package}: pip install {install or package}") from None
