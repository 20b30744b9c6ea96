"""Files are held against safetensors' own; what is read stays what it was when the file was opened."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from axolotl_ivon import IVONError
from axolotl_ivon.storage.dtypes import NUMPY
from axolotl_ivon.storage.tensorfile import TensorFile, TensorWriter


@pytest.mark.parametrize("dtype", NUMPY)
def test_what_is_written_is_read(dtype: str, tmp_path: Path):
    """In any order, from a writer that sorts by width."""
    values = {"a": np.arange(6).reshape(2, 3).astype(NUMPY[dtype]), "b": np.zeros((0, 4), np.float64)}
    specs = {"a": (dtype, (2, 3)), "b": ("F64", (0, 4))}
    with TensorWriter(tmp_path / "x", specs, {"fact": "λ"}) as writer:
        for key in ("b", "a"):
            writer.write(key, values[key].reshape(-1).view(np.uint8).data)
    file = TensorFile(tmp_path / "x")
    assert (file.entries, file.metadata) == (specs, {"fact": "λ"})
    for key, value in values.items():
        assert file.array(key).dtype == value.dtype
        assert np.array_equal(file.array(key), value)


def test_a_tensor_that_was_forgotten_is_noticed(tmp_path: Path):
    with pytest.raises(ValueError, match="never written"), TensorWriter(tmp_path / "x", {"a": ("F32", (2,))}, {}):
        pass


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'  # 54 bytes: data starts at 62
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], "<f4").tobytes())
    assert TensorFile(tmp_path / "x").array("a").tolist() == [1.0, 2.0]


def test_an_open_file_outlives_its_replacement(tmp_path: Path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    save_file({"a": np.zeros(30, np.float32)}, tmp_path / "y")
    (tmp_path / "y").replace(tmp_path / "x")
    assert file.array("a").tolist() == [1.0, 1.0, 1.0]


def test_each_reading_is_the_readers_own(tmp_path: Path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    file.array("a")[:] = 5
    assert file.array("a").tolist() == [1.0, 1.0, 1.0]


def test_a_file_that_is_cut_off_while_open_is_told(tmp_path: Path):
    """A map of the file would end the process with a bus error."""
    save_file({"a": np.ones(10_000, np.float32)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    os.truncate(tmp_path / "x", 100)
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
