"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import IVONError, one_line, param_ref
from .format import CONFIG_FILE, ENSEMBLE_FILE, MEAN_FILE, NEXT_SIGMA_FILE, SIGMA_FILE

# A folder with one of these was written by this project, PEFT or transformers, and may be overwritten.
_MARKERS = (CONFIG_FILE, ENSEMBLE_FILE, "config.json")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and stdio.h


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target` that takes its place when the block ends without an exception.

    Raises:
        IVONError: the file cannot be written; what was there is left.
    """
    temporary = _temporary_path(target)
    with _write_errors(target):
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
    temporary = _temporary_path(target)
    with _write_errors(target):
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
    check_outside(target, inputs)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise IVONError(f"{target} exists; choose another name, or overwrite it with {param_ref('overwrite')}")
    if not target.is_dir():
        raise IVONError(f"{target} is not a folder; choose another name")
    if any(target.iterdir()) and not any((target / name).is_file() for name in _MARKERS):
        raise IVONError(f"{target} holds something other than an adapter, an ensemble or a model; choose another name")


def check_file(path: Path, overwrite: bool = False) -> None:
    """Raise IVONError if `new_file` may not write `path`: worth asking before long work."""
    output = f"{param_ref('output')} {path}"
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "there is no such folder"
        raise IVONError(f"{output}: {what}; give a file in a folder that exists")
    if path.exists() and not overwrite:
        raise IVONError(f"{output} exists; choose another name, or overwrite it with {param_ref('overwrite')}")


def check_folder(folder: Path, overwrite: bool = False, pattern: str = "*") -> None:
    """Raise IVONError if files cannot be written into `folder`, or it holds one of `pattern`: before long work."""
    fix = f"choose another name with {param_ref('output')}"
    if folder.exists() and not folder.is_dir():
        raise IVONError(f"{folder} is not a folder; {fix}")
    if not overwrite and (there := next(folder.glob(pattern), None)):
        raise IVONError(f"{folder} holds {there.name} already; {fix}, or overwrite it with {param_ref('overwrite')}")
    parent = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        raise IVONError(f"{folder} cannot be written (no permission for {parent}); {fix}")


def check_outside(target: Path, inputs: Iterable[Path]) -> None:
    """Raise IVONError if `target` is, holds or lies in one of the folders `inputs`."""
    here = target.resolve()
    for kept in map(Path.resolve, inputs):
        for place, wrong in (("is", here == kept), ("holds", here in kept.parents), ("lies in", kept in here.parents)):
            if wrong:
                raise IVONError(f"{target} {place} the input, which is never modified; choose another name")


def check_space(target: Path, size: int, what: str) -> None:
    """Raise IVONError if the disk where `target` will be has no room for the `size` bytes that `what` takes."""
    place = next(path for path in [target.absolute(), *target.absolute().parents] if path.exists())
    with _write_errors(target):
        total, _, free = shutil.disk_usage(place)
    if total and size > free:  # /proc and its like have no size
        room = f"{what} take {in_bytes(size)}, and {in_bytes(free)} of space are free"
        raise IVONError(f"{target} cannot be written ({room})")


def in_bytes(size: float) -> str:
    """Return a size as people read it: 1.9 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def put_in_place(temporary: Path, target: Path, overwrite: bool = False) -> None:
    """Make a folder's files durable and give it the name `target` in the same file system, replacing what is there.

    Raises:
        OSError: something is there and `overwrite` is not set, or the system refuses.
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
    old = _temporary_path(other)
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

    A reader finds a mean with its own σ at every moment, and after a kill too. The new σ waits under `NEXT_SIGMA_FILE`
    until the new mean has its place, and readers look for it there. Folders in the temporary folder (PEFT's further
    adapters) are treated alike.

    Raises:
        IVONError: a file cannot be written.
    """
    temporary = _temporary_path(folder / "adapter")
    with _write_errors(folder):
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
    """Make a folder for several outputs if it is not there, or raise IVONError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = f"choose another {param_ref('output')}"
        raise IVONError(f"{folder} cannot be written ({error.strerror}); {fix}") from None


def _temporary_path(target: Path) -> Path:
    return target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IVONError(f"{target} cannot be written ({error.strerror or one_line(error)})") from error
