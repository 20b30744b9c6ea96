"""Dtypes and files are held against torch and safetensors; what is read stays what it was when the file was opened."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from axolotl_ivon import IVONError
from axolotl_ivon.storage.dtypes import FLOATS, NUMPY, SAFETENSORS
from axolotl_ivon.storage.tensorfile import TensorFile, TensorWriter

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def in_torch(array: np.ndarray) -> torch.Tensor:
    """The same bits in torch, whose dtype has the same name."""
    dtype = getattr(torch, array.dtype.name)
    return torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).view(dtype)


@pytest.mark.parametrize("name", NUMPY)
def test_names_are_those_of_safetensors_and_torch(name: str, tmp_path: Path):
    tensor = torch.ones(3, dtype=getattr(torch, NUMPY[name].name))
    save_file({"x": tensor}, tmp_path / "x")
    with safe_open(tmp_path / "x", "np") as file:
        assert file.get_slice("x").get_dtype() == name
        assert file.get_tensor("x").dtype == NUMPY[name]
    assert SAFETENSORS[str(tensor.dtype).removeprefix("torch.")] == name
    assert (name in FLOATS) == tensor.is_floating_point()
    assert NUMPY[name].itemsize == tensor.itemsize


@given(st.lists(finite, min_size=1, max_size=50), st.sampled_from(FLOATS))
def test_rounding_is_that_of_torch(values: list[float], dtype: str):
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(getattr(torch, NUMPY[dtype].name))
    with np.errstate(over="ignore"):
        rounded = array.astype(NUMPY[dtype])
    assert torch.equal(in_torch(rounded), expected)
    assert torch.equal(torch.from_numpy(rounded.astype(np.float32)), expected.float())


def test_a_tensor_that_was_forgotten_is_noticed(tmp_path: Path):
    with pytest.raises(ValueError, match="never written"), TensorWriter(tmp_path / "x", {"a": ("F32", (2,))}, {}):
        pass


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'  # 54 bytes: data starts at 62
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], "<f4").tobytes())
    assert TensorFile(tmp_path / "x").array("a").tolist() == [1.0, 2.0]


def test_an_open_file_stays_what_it_was(tmp_path: Path):
    """Replaced, its tensors changed by a reader, and cut off, where a map would end the process with a bus error."""
    save_file({"a": torch.ones(10_000)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    file.array("a")[:] = 5
    os.link(tmp_path / "x", tmp_path / "old")
    save_file({"a": torch.zeros(30)}, tmp_path / "y")
    (tmp_path / "y").replace(tmp_path / "x")
    assert file.array("a").tolist() == [1.0] * 10_000
    os.truncate(tmp_path / "old", 100)
    with pytest.raises(IVONError, match=r"x (cannot be read|is not a complete safetensors file)"):
        file.array("a")


def test_files_that_cannot_be_read_are_told(tmp_path: Path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"1234")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("missing", "has no missing"),
        ("empty", "it is empty"),
        ("short", "not a complete safetensors file"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
    ):
        with pytest.raises(IVONError, match=message):
            TensorFile(tmp_path / name)
