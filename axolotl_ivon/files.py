"""Files and folders: what is read is checked, what is written appears whole or not at all.

Nothing here imports torch. Tensors are read and written one at a time, as bytes in the safetensors format
(https://github.com/huggingface/safetensors, "Format": 8 bytes of header length, a JSON header, the tensors).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import IVONError

CONFIG_FILE = "adapter_config.json"
MEAN_FILE = "adapter_model.safetensors"
SIGMA_FILE = "ivon_sigma.safetensors"
NEXT_SIGMA_FILE = ".ivon_sigma.safetensors.next"  # while the mean that it belongs to is being replaced
ENSEMBLE_FILE = "ensemble.json"

FORMAT = "ivon-lora"
FORMAT_VERSION = "1"

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# What axolotl and the Trainer save beside an adapter that belongs to it: the model card and the tokenizer.
# Optimizer states and their like belong to a checkpoint and stay there.
COMPANIONS = ("README.md", *TOKENIZER_FILES)

# A folder with one of these was written by this project, PEFT or transformers, and may be overwritten.
_MARKERS = (CONFIG_FILE, ENSEMBLE_FILE, "config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The dtypes of the format that adapters have, and their sizes.
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
_JSON_LIMIT = 16 * 2**20
_FLUSH_EVERY = 64 * 2**20
_WRITE_AT_ONCE = 2**20  # for more, Linux looks for larger runs of free memory than there may be
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and stdio.h
_T = TypeVar("_T")


def in_threads(work: Callable[[str], _T], keys: Iterable[str]) -> Generator[_T]:
    """Yield `work(key)` for every key, in order, from as many threads as there are processors (8 at most)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, keys)


def resolve(source: str | os.PathLike[str]) -> Path:
    """Return the folder that `source` names: a folder, or the local copy of a Hugging Face Hub id.

    The Hub is asked only when there is no such folder and `source` has the form `owner/name`.

    Raises:
        IVONError: there is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise IVONError(f"{path} is a file; give the adapter's folder instead")
    if not _HUB_ID.fullmatch(str(source)):
        raise IVONError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(str(source), allow_patterns=[CONFIG_FILE, MEAN_FILE, SIGMA_FILE, *COMPANIONS])
    except Exception as error:  # the client raises a dozen kinds, requests' and httpx' among them
        raise IVONError(f"{source}: no such folder here, and not found on the Hub ({type(error).__name__})") from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        IVONError: it is missing, too large, or not a JSON object of finite numbers.
    """
    try:
        if not (size := _size(path)):
            raise IVONError(f"{path} is not valid JSON (it is empty)")
        if size > _JSON_LIMIT:
            raise IVONError(f"{path} is larger than {_JSON_LIMIT >> 20} MiB; it is not a configuration")
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError as error:
        fix = "; give the folder of a PEFT adapter" if path.name == CONFIG_FILE else ""
        raise IVONError(f"{path.parent} has no {path.name}{fix}") from error
    except OSError as error:
        raise IVONError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise IVONError(f"{path} is not valid JSON ({_one_line(error)})") from error
    if not isinstance(value, dict):
        raise IVONError(f"{path} does not hold a JSON object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def _size(path: Path) -> int:
    """Return the size of a regular file; a pipe or a device, which has no end, is refused."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise IVONError(f"{path} is not a regular file")
    return facts.st_size


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
            if not _size(path):
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
            raise IVONError(f"{path} cannot be read ({error.strerror or _one_line(error)})") from error
        except SafetensorError as error:
            raise IVONError(f"{path} is not a complete safetensors file ({_one_line(error)})") from error
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


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target` that takes its place when the block ends without an exception.

    Raises:
        IVONError: the file cannot be written; what was there is left.
    """
    temporary = _beside(target)
    with _told(target):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Give an empty temporary folder beside `target` that takes its place when the block ends well.

    With `overwrite`, a folder that holds an adapter, an ensemble or a model may be replaced, whole; never one
    that is or contains one of `inputs`.

    Raises:
        IVONError: the target exists, or cannot be written; what was there is left.
    """
    check_target(target, overwrite, inputs)
    if target.is_symlink():
        target = target.resolve()
    temporary = _beside(target)
    with _told(target):
        missing = [p for p in target.absolute().parents if not p.exists()]
        try:
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            put_in_place(temporary, target, overwrite)
            missing = []
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for made in missing:
                with contextlib.suppress(OSError):
                    made.rmdir()


def check_target(target: Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise IVONError if `new_folder` would refuse `target`: worth asking before long work."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise IVONError(f"{target} exists; choose another name, or overwrite it with --overwrite")
    if not target.is_dir():
        raise IVONError(f"{target} is not a folder; choose another name")
    here = target.resolve()
    for kept in map(Path.resolve, inputs):
        if here == kept or here in kept.parents:
            raise IVONError(f"{target} holds the input, which is never modified; choose another name")
    if any(target.iterdir()) and not any((target / name).is_file() for name in _MARKERS):
        raise IVONError(f"{target} holds something other than an adapter, an ensemble or a model; choose another name")


def put_in_place(temporary: Path, target: Path, overwrite: bool = False) -> None:
    """Make a folder's files durable and give it the name `target` in the same file system, replacing what is there.

    Raises:
        OSError: there is something, and not `overwrite`; or the system refuses.
    """
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if not (overwrite and target.is_dir()):
        # POSIX replaces an empty folder and refuses any other: of two writers, the second is told.
        os.rename(temporary, target)
    else:
        _exchange(temporary, target)
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(target.absolute().parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders: at once where Linux can, so that there is no moment without either."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    old = _beside(other)
    os.rename(other, old)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(old, other)
        raise
    os.rename(old, one)


@contextlib.contextmanager
def updated_adapter(folder: Path) -> Iterator[Path]:
    """Give a temporary folder whose files take their places in `folder` when the block ends well; others there stay.

    Whoever reads the adapter meanwhile, or after a kill, finds a mean with its own σ: the new σ waits under
    `NEXT_SIGMA_FILE`, where it is looked for, until the new mean has its place. Folders in the temporary folder (PEFT's
    further adapters) are treated alike.

    Raises:
        IVONError: a file cannot be written.
    """
    temporary = _beside(folder / "adapter")
    with _told(folder):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            files = [path for path in temporary.rglob("*") if path.is_file()]
            for path in files:
                _sync(path)
            places = {path: folder / path.relative_to(temporary) for path in files}
            waiting = []
            for path, place in sorted(places.items(), key=lambda item: item[1].name == MEAN_FILE):
                place.parent.mkdir(exist_ok=True)
                if place.name == SIGMA_FILE:
                    waiting.append(place)
                    place = place.with_name(NEXT_SIGMA_FILE)
                elif place.name == MEAN_FILE:
                    _sync(place.parent)
                os.replace(path, place)
            for place in waiting:
                os.replace(place.with_name(NEXT_SIGMA_FILE), place)
            for parent in {place.parent for place in places.values()}:
                _sync(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def output_folder(folder: Path) -> None:
    """Make a folder for several outputs, if it is not there.

    Raises:
        IVONError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IVONError(f"{folder} cannot be written ({error.strerror}); choose another name with -o") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path, names: Iterable[str] = COMPANIONS) -> None:
    """Copy the model card and the tokenizer that lie beside the adapter in `source`, where there are any; unread.

    A link that leads out of the folder is not followed, unless to the blobs of the Hub's cache: what it names need not
    be the adapter's.
    """
    here = source.resolve()
    for name in names:
        path = source / name
        # What has no size can still be without end, in /proc.
        if path.is_file() and path.stat().st_size:
            found = path.resolve()
            if here in found.parents or here.parent.parent / "blobs" in found.parents:
                shutil.copyfile(path, target / name)


def _beside(target: Path) -> Path:
    return target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IVONError(f"{target} cannot be written ({error.strerror or _one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
