"""safetensors files, read and written one tensor at a time.

The format (https://github.com/huggingface/safetensors, "Format") is 8 bytes of header length, a JSON header, and the
tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import IVONError, one_line
from .dtypes import NUMPY
from .format import regular_size

_FLUSH_EVERY = 64 * 2**20
_WRITE_AT_ONCE = 2**20  # for more, Linux looks for larger runs of free memory than there may be

Spec = tuple[str, tuple[int, ...]]  # of one tensor: dtype as the format names it, and shape


class TensorFile:
    """A safetensors file that stays open, whose tensors are read on demand, from any thread.

    The open file keeps giving the same tensors after another one was renamed over its path. Of its header, `metadata`
    are strings by name, and `specs` dtype and shape by tensor.

    Raises:
        IVONError: the file is missing, truncated, not safetensors, or has dtypes that no adapter has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._read_errors():
            if not regular_size(path):
                raise IVONError(f"{path} is not a complete safetensors file (it is empty)")
            # Not "mmap": the pages that were read would count as memory of this process.
            self._file = safe_open(path, framework="np", backend="pread")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            slices = [(key, self._file.get_slice(key)) for key in self._file.offset_keys()]
        self.specs: dict[str, Spec] = {key: (str(s.get_dtype()), tuple(s.get_shape())) for key, s in slices}
        for key, (dtype, _) in self.specs.items():
            if dtype not in NUMPY:
                raise IVONError(f"{path}: {key} has dtype {dtype}; save the adapter as float32 or bfloat16")

    def array(self, key: str) -> np.ndarray:
        """Return one tensor: a new array of the dtype in `dtypes.NUMPY`.

        Raises:
            IVONError: the file was cut off since it was opened, or cannot be read.
        """
        with self._read_errors():
            return self._file.get_tensor(key)

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise IVONError(f"{self.path.parent} has no {self.path.name}") from error
        except OSError as error:
            raise IVONError(f"{self.path} cannot be read ({error.strerror or one_line(error)})") from error
        except SafetensorError as error:
            raise IVONError(f"{self.path} is not a complete safetensors file ({one_line(error)})") from error


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in any order and from any thread.

    Use as a context manager; the file is on the disk, and complete, when the block ends.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        offset = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._left: dict[str, tuple[int, int]] = {}
        # As safetensors does: wide dtypes first, so that every tensor is aligned to its own.
        for key, (dtype, shape) in sorted(specs.items(), key=lambda item: (-NUMPY[item[1][0]].itemsize, item[0])):
            size = NUMPY[dtype].itemsize * math.prod(shape)
            self._entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._left[key] = (offset, size)
            offset += size
        header = self._header(metadata)
        self._file = path.open("xb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._unflushed = 0
        self._data = len(header)
        self._put(header, 0)
        os.ftruncate(self._file.fileno(), self._data + offset)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        strings = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        text = json.dumps({**strings, **self._entries}, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Write other metadata of the same length in place of those given at first."""
        header = self._header(metadata)
        if len(header) != self._data:
            raise ValueError(f"the header has {len(header)} bytes where {self._data} belong")
        self._put(header, 0)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view.nbytes:
            written = os.pwrite(self._file.fileno(), view[:_WRITE_AT_ONCE], offset)
            view, offset = view[written:], offset + written

    def write(self, key: str, data: memoryview) -> None:
        """Write the little-endian, row-major bytes of one tensor, given as a flat view of bytes."""
        offset, size = self._left.pop(key)
        if data.nbytes != size:
            raise ValueError(f"{key}: {data.nbytes} bytes where {size} belong")
        if size:
            self._put(data, self._data + offset)
        self._unflushed += size
        if self._unflushed >= _FLUSH_EVERY and all(flush.done() for flush in self._flushes):
            # The disk works while the next tensors are computed, not only at the end.
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, self._file.fileno()))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._flusher.shutdown()
        with self._file:
            if kind is None:
                for flush in self._flushes:
                    flush.result()
                if self._left:
                    raise ValueError(f"{len(self._left)} tensors were never written, {min(self._left)} among them")
                os.fsync(self._file.fileno())
