"""The kernels compiled by numba: their noise, and what becomes of them where numba cannot do its work."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
import torch
from numba.core import caching
from toy import chunk_of

import axolotl_ivon
from axolotl_ivon.optim.kernels import cpu, plain

NameOf = Callable[[int], str]


def test_the_noise_is_that_of_the_plain_kernels() -> None:
    chunk = chunk_of([7, 200_001, 15])
    assert torch.equal(plain.noise(chunk, chunk.streams), cpu.noise(chunk, chunk.streams))


def test_without_numba_or_with_one_that_fails_the_plain_operations_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name_of: NameOf
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert name_of(2**18) == "plain"
        assert not caplog.records
    monkeypatch.setattr("numba.njit", lambda **_: 1 / 0)
    monkeypatch.delitem(sys.modules, "axolotl_ivon.optim.kernels.cpu", raising=False)
    assert name_of(2**18) == "plain"
    assert "costs time only" in caplog.text


def test_importing_the_optimizer_imports_no_numba() -> None:
    code = "import sys, axolotl_ivon.optim.ivon; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_where_no_cache_can_be_written_the_kernels_are_compiled_without(
    monkeypatch: pytest.MonkeyPatch, name_of: NameOf
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    monkeypatch.delitem(sys.modules, "axolotl_ivon.optim.kernels.cpu", raising=False)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(Path.exists)
    assert name_of(2**18) == "cpu"


def test_with_a_cache_that_is_really_unwritable_the_kernels_are_compiled_without(tmp_path: Path) -> None:
    """All places that numba would keep it in lie below a file, which stops even root."""
    package = Path(axolotl_ivon.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / package.name / "optim" / "kernels" / "__pycache__"
    file.touch()
    code = """if True:
        import numba, torch, axolotl_ivon.optim.kernels as kernels
        try:
            numba.njit(cache=True)(kernels.choose)
        except RuntimeError as error:
            assert "cannot cache" in str(error)
        else:
            raise AssertionError("numba found a place to write in")
        print(kernels.choose([torch.ones(2**18)]).__file__)
    """
    below = str(file / "cache")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"), below)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(file.with_name("cpu.py"))
    assert not done.stderr
