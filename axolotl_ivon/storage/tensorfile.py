"""safetensors files, read and written one tensor at a time, as bytes.

The format (https://github.com/huggingface/safetensors, "Format") is 8 bytes of header length, a JSON header, and the
tensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import IVONError, one_line
from .format import regular_size

_T = TypeVar("_T")
_FLUSH_EVERY = 64 * 2**20
_WRITE_AT_ONCE = 2**20  # for more, Linux looks for larger runs of free memory than there may be
# The dtypes of the format that adapters have, and their sizes.
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}


def in_threads(work: Callable[[str], _T], keys: Iterable[str]) -> Generator[_T]:
    """Yield `work(key)` for every key, in order, from as many threads as there are processors (8 at most)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, keys)


class Entry(NamedTuple):
    """One tensor of a safetensors file: dtype as the format names it, shape, first byte, number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A safetensors file that stays open: its header, and each tensor's bytes mapped on demand.

    The open file keeps giving the same bytes after another one was renamed over its path.

    Raises:
        IVONError: the file is missing, truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            if not regular_size(path):
                raise IVONError(f"{path} is not a complete safetensors file (it is empty)")
            self._file = path.open("rb")
            # The descriptor's own path, so that header and bytes come from one file even if it is replaced now.
            same = f"/proc/self/fd/{self._file.fileno()}"
            with safe_open(same if os.path.exists(same) else path, framework="np") as header:
                self.metadata: dict[str, str] = dict(header.metadata() or {})
                slices = [(key, header.get_slice(key)) for key in header.offset_keys()]
                shapes = [(key, str(s.get_dtype()), tuple(s.get_shape())) for key, s in slices]
        except FileNotFoundError as error:
            raise IVONError(f"{path.parent} has no {path.name}") from error
        except OSError as error:
            raise IVONError(f"{path} cannot be read ({error.strerror or one_line(error)})") from error
        except SafetensorError as error:
            raise IVONError(f"{path} is not a complete safetensors file ({one_line(error)})") from error
        # safetensors has checked that the tensors fill the rest of the file without gaps, in this order.
        sizes = []
        for key, dtype, shape in shapes:
            if dtype not in _BYTES:
                raise IVONError(f"{path}: {key} has dtype {dtype}; save the adapter as float32 or bfloat16")
            sizes.append(_BYTES[dtype] * math.prod(shape))
        start = os.fstat(self._file.fileno()).st_size - sum(sizes)
        self.entries: dict[str, Entry] = {}
        for (key, dtype, shape), size in zip(shapes, sizes, strict=True):
            self.entries[key] = Entry(dtype, shape, start, size)
            start += size

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def buffer(self, key: str) -> memoryview:
        """Return the bytes of one tensor: a private map of the file, writable without changing the file."""
        entry = self.entries[key]
        if not entry.nbytes:
            return memoryview(bytearray())
        skip = entry.start % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(self._file.fileno(), entry.nbytes + skip, offset=entry.start - skip, access=mmap.ACCESS_COPY)
        return memoryview(view)[skip:]


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in any order and from any thread.

    `specs` gives every tensor's dtype (as the format names it) and shape. Use as a context manager; the file is
    on the disk, and complete, when the block ends.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        offset = 0
        self._left: dict[str, tuple[int, int]] = {}
        # As safetensors does: wide dtypes first, so that every tensor is aligned to its own.
        for key, (dtype, shape) in sorted(specs.items(), key=lambda item: (-_BYTES[item[1][0]], item[0])):
            size = _BYTES[dtype] * math.prod(shape)
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._left[key] = (offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._unflushed = 0
        self._data = 8 + len(text)
        self._put(len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self._file.fileno(), self._data + offset)

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
