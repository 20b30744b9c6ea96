"""Texts of random tokens, some of which are labels."""

from __future__ import annotations

import torch

from axolotl_ivon.data.encode import EncodedExample


def items(count: int = 5, seed: int = 0) -> list[EncodedExample]:
    """Texts of different lengths, some of whose tokens are labels."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, 200, (6 + 3 * number,), generator=draw).tolist()
        positions = list(range(2 + number, len(ids) - 1, 1 + number % 2))
        found.append(EncodedExample(ids, positions, [ids[position + 1] for position in positions]))
    return found
