"""A file that grows by a line for each input, and that an interrupted run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import IVONError, param_ref
from ..storage.atomic import check_file, check_outside, new_file
from ..storage.format import read_json, write_json

_ADDED = ("sigma",)  # settings that files of earlier versions lack
FIX = f"choose another {param_ref('output')}, or start anew with {param_ref('overwrite')}"


def settings_path(path: str | Path) -> Path:
    """Return where the settings of a file are kept."""
    return Path(f"{path}.settings.json")


class ResumableFile:
    """Lines of one run, and beside them FILE.settings.json with what they were made with.

    What was written is on the disk before the next is made; half a line at the end, which an interrupt may leave, is
    dropped. `done` is the number of lines in the file, once `_lines` has read those of an earlier run.

    Args:
        settings: what the lines depend on; a file that was made with others is refused.
        command: the command that writes such files.
        overwrite: start the file anew.
        inputs: folders into which no file is written.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        command: str,
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
    ) -> None:
        self.path, self._settings = Path(path), dict(settings)
        self._file: IO[bytes] | None = None
        self._before: dict[str, Any] = {}  # the settings of an earlier run, which this one continues
        self._size = self.done = 0
        check_file(self.path, overwrite=True)
        check_outside(self.path, inputs)
        self._resumed = self.path.exists() and not overwrite
        if not self._resumed:
            return
        if not settings_path(path).exists():
            raise IVONError(f"{path} exists and was not made by `{command}`; {FIX}")
        self._before = read_json(settings_path(path))
        for name, value in json.loads(json.dumps(self._settings)).items():
            before = self._before.get(name, value if name in _ADDED else None)
            if before != value:
                raise IVONError(f"{path} was made with {name} {before!r}, not {value!r}; {FIX}")

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """Yield `FILE:LINE` and the line for all that an earlier run has written; what is taken is counted as done."""
        try:
            content = self.path.read_bytes() if self._resumed else b""
        except OSError as error:
            raise IVONError(f"{param_ref('output')} {self.path}: cannot be read ({error.strerror})") from None
        for line in content.split(b"\n")[:-1]:  # the last is empty, or half a line
            yield f"{self.path}:{self.done + 1}", line
            self._size += len(line) + 1
            self.done += 1

    def _write(self, *lines: bytes) -> None:
        """Write lines to the disk."""
        try:
            self._file = self._file or self._open()
            self._file.write(b"".join(line + b"\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise IVONError(f"{self.path} cannot be written ({error.strerror})") from None
        self.done += len(lines)

    def _open(self) -> IO[bytes]:
        if self._resumed:
            os.truncate(self.path, self._size)
            return self.path.open("ab")
        self.path.unlink(missing_ok=True)
        self._save_settings()
        return self.path.open("xb")

    def _save_settings(self, **more: Any) -> None:
        with new_file(settings_path(self.path)) as temporary:
            write_json(temporary, {**self._settings, **more})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
