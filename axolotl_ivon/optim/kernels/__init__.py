"""The kernels of the optimizer: what runs over every weight."""

from __future__ import annotations

from typing import Any

import torch

from .plain import Arithmetic

# Weights from which on a CPU the seconds that it takes to compile the arithmetic are worth it.
_COMPILED = 2**18


def _block_type(groups: list[dict[str, Any]]) -> Any:
    from ..buffers import Block

    params = [param for group in groups for param in group["params"]]
    if len(groups) > 1 or {param.device.type for param in params} != {"cuda"}:
        return Block
    try:
        from .gpu import FusedBlock, usable
    except ImportError:  # a build without Triton
        return Block
    return FusedBlock if usable(params) else Block


def _arithmetic(device: torch.device, weights: int) -> type[Arithmetic]:
    if device.type != "cpu" or weights < _COMPILED:
        return Arithmetic
    from .cpu import arithmetic

    return arithmetic() or Arithmetic
