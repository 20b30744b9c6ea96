"""stdout is for results: what libraries print while a command works goes to stderr."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import IO

_STDOUT, _STDERR = 1, 2  # file descriptors

# Where results go while everything else that is printed goes to stderr.
_kept: IO[str] | None = None


def results() -> IO[str]:
    """Return the stream for results."""
    return _kept or sys.stdout


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """Leave stdout to what is written to `results()`: whatever is printed otherwise, from C too, goes to stderr.

    It may be nested.
    """
    global _kept
    if _kept is not None or not (sys.stdout and sys.stderr):  # None: the caller has closed it
        yield
        return
    own = kept = sys.stdout
    own.flush()
    with contextlib.ExitStack() as stack:
        if _descriptor(own) == _STDOUT:  # else a caller in this process has put something else there
            kept = stack.enter_context(open(os.dup(_STDOUT), "w", encoding=own.encoding, errors=own.errors))
            os.dup2(_STDERR, _STDOUT)
            stack.callback(os.dup2, kept.fileno(), _STDOUT)
            stack.callback(own.flush)  # what somebody has written who held on to it
            stack.callback(ctypes.CDLL(None).fflush, None)  # and C's printf
        _kept = kept
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            _kept = None
            kept.flush()


def end() -> None:
    """Send to stderr what is still printed while the interpreter ends: it is no result."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
        if sys.stdout:
            sys.stdout.flush()
        os.dup2(_STDERR, _STDOUT)


def _descriptor(stream: IO[str]) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
