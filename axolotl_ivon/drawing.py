"""Random numbers that are the same on every machine, in every thread and in whatever order they are asked for.

Each stream is numpy's PCG64DXSM, whose bits numpy promises to keep, seeded with a hash of what the stream is for.
The normals are made from those bits by table lookup and one addition, which IEEE arithmetic fixes to the last bit
(numpy's own normals may change between releases, torch's differ between instruction sets), at a third of
the cost of numpy's.
"""

from __future__ import annotations

import functools
import hashlib
from statistics import NormalDist

import numpy as np

# Values made at a time: what is in flight stays in the cache. Another number would give other draws.
_BLOCK = 2**15


def generator(*key: object) -> np.random.Generator:
    """Return the generator that belongs to `key` (strings and integers)."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(digest, "little")))


@functools.cache
def _quantiles() -> np.ndarray:
    # The normal quantiles of the 65,536 values of 16 random bits, scaled so that the sum of two has variance 1.
    lower = np.array([NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15)])
    table = np.concatenate([lower, -lower[::-1]])
    return (table / np.sqrt(2 * np.mean(table**2))).astype(np.float32)


def normals(size: int, *key: object) -> np.ndarray:
    """Return float32 standard normals, shape [size]: the stream of `key`.

    Each is the sum of two quantized normals of variance ½, each picked by 16 random bits: mean 0 and variance 1
    exactly, fourth moment 3 − 4e-4, at most 6.1 in size.
    """
    bits = generator(*key).bit_generator
    table = _quantiles()
    result = np.empty(size, np.float32)
    place = np.empty(_BLOCK, np.intp)
    first, second = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, size, _BLOCK):
        n = min(_BLOCK, size - start)
        raw = bits.random_raw(_BLOCK // 2).astype("<u8", copy=False)
        for half, out in zip(raw.view("<u2").reshape(2, _BLOCK), (first, second), strict=True):
            np.copyto(place, half)
            np.take(table, place, out=out, mode="clip")  # "clip" saves numpy a copy; nothing is out of range
        np.add(first[:n], second[:n], out=result[start : start + n])
    return result
