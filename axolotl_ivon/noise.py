"""Random numbers that are the same on every machine, in every thread and in whatever order they are asked for.

The normals are made from random bits by table lookup and one addition, which IEEE arithmetic fixes to the last bit
(numpy's own normals may change between releases, torch's differ between instruction sets), at a third of
the cost of numpy's. The bits of an adapter's draws are numpy's PCG64DXSM, which numpy promises to keep, seeded with a
hash of what the stream is for; those of training noise are a hash of their place, which a compiler can vectorize.
"""

from __future__ import annotations

import functools
import hashlib
from statistics import NormalDist
from typing import Any

import numpy as np

# Values made at a time: what is in flight stays in the cache. Another number would give other draws.
_BLOCK = 2**15
_TRAINING_BLOCK = 2**14  # here any even number gives the same
# Of the mixing function.
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_1, _27, _30, _31 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31)


def generator(*key: object) -> np.random.Generator:
    """Return the generator that belongs to `key` (strings and integers)."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(digest, "little")))


@functools.cache
def quantiles() -> np.ndarray:
    """Return a table, float32 [65536]: two of its values, picked by 16 random bits each, add up to a normal."""
    # The normal quantiles of the 65,536 values of 16 random bits, scaled so that the sum of two has variance 1.
    lower = np.array([NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15)])
    table = np.concatenate([lower, -lower[::-1]])
    return (table / np.sqrt(2 * np.mean(table**2))).astype(np.float32)


def normals(size: int, *key: object) -> np.ndarray:
    """Return float32 standard normals, shape [size]: the stream of `key`.

    Each is the sum of two quantized normals of variance ½, each picked by 16 random bits: mean 0 and variance 1
    exactly, fourth moment 3 − 4e-4, at most 6.12 in size.
    """
    bits = generator(*key).bit_generator
    look_up = _LookUp(_BLOCK)
    result = np.empty(size, np.float32)
    for start in range(0, size, _BLOCK):
        raw = bits.random_raw(_BLOCK // 2).astype("<u8", copy=False)
        look_up(raw.view("<u2").reshape(2, _BLOCK), result[start : start + _BLOCK])
    return result


class _LookUp:
    """Adds up quantiles that are picked by 16 bits each, in room that is used again."""

    def __init__(self, size: int) -> None:
        self._table, self._place = quantiles(), np.empty(size, np.intp)
        self._values = np.empty((2, size), np.float32)

    def __call__(self, halves: np.ndarray, out: np.ndarray) -> None:
        """Put the sums of two quantiles, picked by `halves` [2, size], into `out`, which may be shorter."""
        for half, values in zip(halves, self._values, strict=True):
            np.copyto(self._place, half)
            # "clip" saves numpy a copy; nothing is out of range
            np.take(self._table, self._place, out=values, mode="clip")
        first, second = self._values[:, : out.size]
        np.add(first, second, out=out)


def random_bits(text: str) -> np.ndarray:
    """Return 128 bits that belong to `text`: uint64 [2]."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8").astype(np.uint64)


def splitmix64(place: Any, start: Any, stride: Any) -> Any:
    """Return 64 random bits for a place in the stream of (start, stride), all uint64; numba compiles this as it is.

    It is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with Stafford's 13th mixing function. The stride, made odd, is
    part of the seed, so that no two streams are the same one a few places apart.
    """
    z = start + place * (stride | _1)
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)


def training_noise(out: np.ndarray, start: np.uint64, stride: np.uint64) -> None:
    """Fill float32 `out` [size] with the standard normals of a stream whose seed is 128 random bits.

    64 bits of the stream make two of them.
    """
    size = min(_TRAINING_BLOCK, out.size + out.size % 2)
    place, look_up = np.arange(size // 2, dtype=np.uint64), _LookUp(size)
    for begin in range(0, out.size, size or 1):
        raw = splitmix64(place, start, stride).astype("<u8", copy=False)
        look_up(raw.view("<u2").reshape(-1, 2).T, out[begin : begin + size])
        place += np.uint64(size // 2)
