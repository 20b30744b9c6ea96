"""Kernels as in a process that has chosen none yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from axolotl_ivon.optim import kernels


@pytest.fixture
def name_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """Return the name of the kernels that are chosen for so many weights, each time anew."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_tried", kernels._tried.__wrapped__)
    monkeypatch.setattr(kernels, "_warn", kernels._warn.__wrapped__)
    return lambda weights: kernels.choose([nn.Parameter(torch.ones(weights))]).__name__.rsplit(".")[-1]
