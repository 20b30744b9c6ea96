"""Which kernels are chosen, and what is said where that cannot be."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn

from axolotl_ivon import IVONLoRA
from axolotl_ivon.errors import IVONError
from axolotl_ivon.optim import kernels

NameOf = Callable[[int], str]


def test_a_small_adapter_is_not_worth_compiling_for(name_of: NameOf) -> None:
    assert name_of(2**18 - 1) == "plain"
    assert name_of(2**18) == "cpu"


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_the_variable_overrides_the_size(name: str, monkeypatch: pytest.MonkeyPatch, name_of: NameOf) -> None:
    monkeypatch.setenv("IVON_KERNELS", name)
    assert name_of(3) == name_of(2**18) == name


def test_a_wrong_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVON_KERNELS", "cuda")
    with pytest.raises(IVONError, match=r"^IVON_KERNELS=cuda: must be plain, cpu or gpu$"):
        IVONLoRA([nn.Parameter(torch.ones(3))], ess=1.0)


def test_what_cannot_be_used_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, name_of: NameOf) -> None:
    monkeypatch.setenv("IVON_KERNELS", "gpu")
    with pytest.raises(
        IVONError, match=r"IVON_KERNELS=gpu cannot be used for torch.float32 parameters on cpu: "
    ) as error:
        name_of(3)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("IVON_KERNELS", "cpu")
    with pytest.raises(IVONError, match=r"on meta: they are for a CPU"):
        kernels.choose([nn.Parameter(torch.ones(3, device="meta"))])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(IVONError, match="on cpu: numba is not installed"):
        name_of(3)


def test_kernels_that_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name_of: NameOf
) -> None:
    cpu = importlib.import_module("axolotl_ivon.optim.kernels.cpu")
    monkeypatch.setattr(cpu, "squares", lambda chunk: torch.zeros(len(chunk.sizes)))
    assert name_of(2**18) == "plain"
    assert "costs time only" in caplog.text
