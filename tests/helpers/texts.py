"""Examples of benchmarks/fidelity."""

from __future__ import annotations

import random

from benchmarks.fidelity.data import Example


def two_classes(count: int, seed: int = 0, token: int = 7) -> list[Example]:
    """Texts whose class is whether a token is in them."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        ids = [1, *(rng.randrange(10, 50) for _ in range(rng.randrange(3, 9)))]
        if i % 2:
            ids[rng.randrange(1, len(ids))] = token
        made.append(Example(ids, i % 2))
    return made
