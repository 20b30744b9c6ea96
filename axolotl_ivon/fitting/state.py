"""The hidden file from which an interrupted fit continues: tensors, and values in its header."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import IVONError
from ..posterior.tensors import Tensors, write_tensors
from ..storage.atomic import new_file, output_folder
from ..storage.tensorfile import TensorFile

_EVERY = 30.0  # seconds between two writes


class Snapshot(NamedTuple):
    """Where a fit is: tensors by name, and what JSON can hold."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class State:
    """The file of the fit that `key` identifies, or none where `path` is None; that of another fit is replaced."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key, self._written = path, key, time.monotonic()

    def read(self) -> Snapshot | None:
        """Return what was kept of this fit; None without a file, or with a damaged one."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            file = TensorFile(self._path)
            if file.metadata.get("fit") != self._key:
                return None
            return Snapshot(dict(Tensors.of_file(file)), json.loads(file.metadata["facts"]))
        except (IVONError, KeyError, ValueError):
            return None

    def write(self, snapshot: Snapshot) -> None:
        """Write the file, whole or not at all, and the folder that it is in, where that is not there yet.

        Raises:
            IVONError: it cannot be written.
        """
        if self._path is None:
            return
        output_folder(self._path.parent)
        with new_file(self._path) as temporary:
            header = {"fit": self._key, "facts": json.dumps(snapshot.values)}
            write_tensors(temporary, Tensors.of(snapshot.tensors), header)
        self._written = time.monotonic()

    def keep(self, snapshot: Callable[[], Snapshot]) -> None:
        """Write it if the last time was a while ago."""
        if self._path is not None and time.monotonic() - self._written >= _EVERY:
            self.write(snapshot())

    @contextlib.contextmanager
    def kept(self, snapshot: Callable[[], Snapshot]) -> Iterator[None]:
        """Write it when the block is interrupted, or fails."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(IVONError):  # what went wrong matters more
                self.write(snapshot())
            raise
