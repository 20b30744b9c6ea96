"""Tensors by name, read, changed and written one at a time, in numpy.

Importing torch takes longer than most commands take to work, so it is imported only when somebody asks for a torch
tensor. A *raw* array has the tensor's own dtype (`storage.dtypes.NUMPY`), bfloat16 included.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import IVONError
from ..reporter import SILENT, Reporter
from ..storage.dtypes import FLOATS, NUMPY, SAFETENSORS
from ..storage.tensorfile import Spec, TensorFile, TensorWriter

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def in_threads(work: Callable[[str], _T], keys: Iterable[str]) -> Generator[_T]:
    """Yield `work(key)` for every key, in order, from as many threads as there are processors (8 at most)."""
    # glibc keeps freed memory up to twice the largest block that was freed so far. Without this block, the memory of
    # every tensor goes back to the system and returns page by page: 7 % of the processor time of `combine`.
    np.empty(31 * 2**20, np.uint8)
    # Not `optim.threads`: that one counts torch's threads, turns gradients off, and gives its results all at once.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, keys)


def as_float32(raw: np.ndarray) -> np.ndarray:
    """Return the values of a raw array as float32; float32 itself is not copied."""
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
        return raw.astype(np.float32, copy=False)


class Tensors(Mapping[str, "torch.Tensor"]):
    """A mapping from names to torch tensors, each made on demand: to change one changes nothing here.

    A pickle holds all of them.

    Attributes:
        specs: dtype (as safetensors names it) and shape of every tensor, known without making it.
        raw: makes one tensor, by its name, as a raw array.
    """

    def __init__(self, specs: Mapping[str, Spec], raw: Callable[[str], np.ndarray]) -> None:
        self.specs = dict(specs)
        self.raw = raw

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], copied: bool = False) -> Tensors:
        """Wrap torch tensors that are in memory, or copies of them."""
        if isinstance(tensors, Tensors):
            return tensors
        import torch

        held, specs = {}, {}
        for key, tensor in tensors.items():
            dtype = SAFETENSORS.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise IVONError(f"{key} has dtype {tensor.dtype}, which is not supported; use float32 or bfloat16")
            specs[key] = (dtype, tuple(tensor.shape))
            tensor = tensor.detach().to("cpu", copy=copied).contiguous()
            held[key] = (tensor.view(torch.int16) if dtype == "BF16" else tensor).numpy().view(NUMPY[dtype])
        return cls.of_raw(specs, held)

    @classmethod
    def of_raw(cls, specs: Mapping[str, Spec], held: Mapping[str, np.ndarray]) -> Tensors:
        """Wrap raw arrays that are in memory, which cannot be written to from then on."""
        for raw in held.values():
            raw.flags.writeable = False
        return cls(specs, held.__getitem__)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tensors.of_raw, (self.specs, {key: np.asarray(self.raw(key)) for key in self})

    def __deepcopy__(self, memo: object) -> Tensors:
        return self

    @classmethod
    def of_file(cls, file: TensorFile) -> Tensors:
        """Read tensors from an open safetensors file, each time that one is asked for."""
        return cls(file.specs, file.array)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.specs:
            raise KeyError(key)
        import torch

        raw = np.asarray(self.raw(key))  # numpy makes scalars of 0-d arrays
        raw = raw if raw.flags.writeable else raw.copy()  # torch knows no tensor that cannot be written to
        if self.specs[key][0] == "BF16":
            return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(raw)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def float32(self, key: str) -> np.ndarray:
        """Return the values of one tensor as float32; do not write to it."""
        return as_float32(self.raw(key))

    def map(self, change: Callable[[str, np.ndarray], np.ndarray]) -> Tensors:
        """Return tensors of the same dtypes and shapes: `change(name, raw)` of these."""
        return Tensors(self.specs, lambda key: change(key, self.raw(key)))

    def each(self, work: Callable[[str], _T], doing: str = "", reporter: Reporter = SILENT) -> dict[str, _T]:
        """Return `work(name)` for every name, done in threads; the reporter hears of `doing`, counted in weights."""
        results = {}
        with contextlib.closing(in_threads(work, self)) as made:  # on an interrupt, wait for the threads
            for key, result in zip(self, made, strict=True):
                results[key] = result
                reporter.advance(doing, self.size(key), self.weights)
        return results

    def is_float(self, key: str) -> bool:
        """Return whether a tensor holds floating-point numbers."""
        return self.specs[key][0] in FLOATS

    def size(self, key: str) -> int:
        """Return the number of weights in one tensor."""
        return math.prod(self.specs[key][1])

    @functools.cached_property
    def weights(self) -> int:
        """The number of weights in all tensors."""
        return sum(map(self.size, self.specs))

    @property
    def bytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(self.size(key) * NUMPY[dtype].itemsize for key, (dtype, _) in self.specs.items())


def as_bytes(raw: np.ndarray) -> memoryview:
    """Return the row-major bytes of a raw array."""
    return np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data


def sha256(raw: np.ndarray) -> str:
    """Return the SHA-256 of a raw array's bytes, in hexadecimal."""
    return hashlib.sha256(as_bytes(raw)).hexdigest()


def fingerprint(tensors: Tensors, digests: Mapping[str, str]) -> str:
    """Return the fingerprint of tensors whose `sha256` are known; see `posterior.mean_sha256`."""
    entries = [[key, tensors.specs[key][0], list(tensors.specs[key][1]), digests[key]] for key in sorted(tensors)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def head_size(specs: Mapping[str, Spec]) -> int | None:
    """Return how many labels the classification head among the tensors of an adapter has; None without one."""
    # A head may have hidden layers (classifier.dense) before the one that gives the labels: the narrowest.
    widths = [
        shape[0]
        for key, (_, shape) in specs.items()
        if key.endswith(".weight") and "lora_" not in key and {"score", "classifier"} & {*key.split(".")}
    ]
    return min(widths, default=None)


def write_tensors(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str],
    reporter: Reporter = SILENT,
    hashed: bool = False,
    signed: str | None = None,
) -> dict[str, str]:
    """Write a safetensors file, a tensor at a time, and return every tensor's `sha256` if `hashed`.

    `signed` names a fact of `metadata` that is to be the tensors' fingerprint.
    """
    if signed:
        metadata = {**metadata, signed: "0" * 64}  # replaced when all tensors, each made only once, are hashed
    with TensorWriter(path, tensors.specs, metadata) as writer:

        def write(key: str) -> str:
            try:
                with np.errstate(over="raise"):
                    raw = tensors.raw(key)
            except FloatingPointError as error:
                raise IVONError(f"{path.name}: a value of {key} is too large for {tensors.specs[key][0]}") from error
            writer.write(key, as_bytes(raw))
            return sha256(raw) if hashed or signed else ""

        digests = tensors.each(write, f"writing {path.name}", reporter)
        if signed:
            writer.replace_metadata({**metadata, signed: fingerprint(tensors, digests)})
        return digests
