"""Which kernels are chosen, and what is said where that cannot be."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from axolotl_ivon import IVONLoRA
from axolotl_ivon.errors import IVONError
from axolotl_ivon.optim import kernels


@pytest.fixture(autouse=True)
def _nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_tried", kernels._tried.__wrapped__)
    monkeypatch.setattr(kernels, "_warn", kernels._warn.__wrapped__)


def name_of(weights: int) -> str:
    return kernels.choose([nn.Parameter(torch.ones(weights))]).__name__.rsplit(".")[-1]


def test_a_small_adapter_is_not_worth_compiling_for() -> None:
    assert name_of(2**18 - 1) == "plain"
    assert name_of(2**18) == "cpu"


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_the_variable_overrides_the_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVON_KERNELS", name)
    assert name_of(3) == name_of(2**18) == name


def test_a_wrong_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVON_KERNELS", "cuda")
    with pytest.raises(IVONError, match=r"^IVON_KERNELS=cuda: must be plain, cpu or gpu$"):
        IVONLoRA([nn.Parameter(torch.ones(3))], ess=1.0)


def test_what_cannot_be_used_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_without_numba_or_with_one_that_fails_the_plain_operations_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert name_of(2**18) == "plain"
        assert not caplog.records
    monkeypatch.setattr("numba.njit", lambda **_: 1 / 0)
    monkeypatch.delitem(sys.modules, "axolotl_ivon.optim.kernels.cpu", raising=False)
    assert name_of(2**18) == "plain"
    assert "costs time only" in caplog.text


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from axolotl_ivon.optim.kernels import cpu

    monkeypatch.setattr(cpu, "squares", lambda chunk: torch.zeros(len(chunk.sizes)))
    assert name_of(2**18) == "plain"
    assert "costs time only" in caplog.text


def test_importing_the_optimizer_imports_no_numba() -> None:
    code = "import sys, axolotl_ivon.optim.ivon; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_where_no_cache_can_be_written_the_kernels_are_compiled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    monkeypatch.delitem(sys.modules, "axolotl_ivon.optim.kernels.cpu", raising=False)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(Path.exists)
    assert name_of(2**18) == "cpu"
