"""Kernels that a test is run with, or that a process would choose which has chosen none yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from axolotl_ivon import IVONLoRA
from axolotl_ivon.optim import kernels


@pytest.fixture(scope="module", params=["plain", "cpu"])
def both_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the tests of a module with torch's operations and with the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, request.param)
        [buffers] = IVONLoRA([nn.Parameter(torch.ones(1))], ess=1.0)._get_buffers()
        assert buffers.kernels.__name__.endswith(f".{request.param}")
        yield


@pytest.fixture
def name_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """Return the name of the kernels that are chosen for so many weights, each time anew."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_tried", kernels._tried.__wrapped__)
    monkeypatch.setattr(kernels, "_warn", kernels._warn.__wrapped__)
    return lambda weights: kernels.choose([nn.Parameter(torch.ones(weights))]).__name__.rsplit(".")[-1]
