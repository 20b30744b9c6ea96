"""Raw arrays are held against torch, which has all the dtypes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from axolotl_ivon import IVONError
from axolotl_ivon.posterior.tensors import Tensors, from_float, to_float32, write_tensors
from axolotl_ivon.storage.tensorfile import TensorFile

NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=1, max_size=50), st.sampled_from(list(NAMES)))
def test_rounding_is_that_of_torch(values: list[float], dtype: str):
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(NAMES[dtype])
    with np.errstate(over="ignore"):
        raw = from_float(array, dtype)
    held = Tensors({"x": (dtype, (len(values),))}, lambda _: raw)
    assert torch.equal(held["x"], expected)
    assert torch.equal(torch.from_numpy(to_float32(raw, dtype)), expected.float())


def test_ties_round_to_even_in_bfloat16():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000], np.uint32).view(np.float32)
    assert from_float(halfway, "BF16").tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]


dtypes = st.sampled_from([*NAMES.values(), torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(dtypes, shapes), min_size=1, max_size=6),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_files_are_those_of_safetensors(tmp_path_factory: pytest.TempPathFactory, wanted: dict, metadata: dict):
    wanted.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("files")
    tensors = {
        key: (torch.arange(int(np.prod(shape)), dtype=torch.float64) - 3).reshape(shape).to(dtype)
        for key, (dtype, shape) in wanted.items()
    }
    write_tensors(folder / "ours", Tensors.of(tensors), metadata)
    save_file(tensors, folder / "theirs", metadata)
    for loaded in (load_file(folder / "ours"), Tensors.of_file(TensorFile(folder / "theirs"))):
        assert set(loaded) == set(tensors)
        for key, tensor in tensors.items():
            assert loaded[key].dtype == tensor.dtype
            assert torch.equal(loaded[key], tensor)
    assert TensorFile(folder / "ours").metadata == metadata


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'  # 54 bytes: data starts at 62
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], "<f4").tobytes())
    assert Tensors.of_file(TensorFile(tmp_path / "x"))["a"].tolist() == [1.0, 2.0]


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    held = Tensors.of_file(TensorFile(tmp_path / "x"))
    held["a"].mul_(5)
    assert held["a"].tolist() == [1.0, 1.0, 1.0]
    assert (tmp_path / "x").read_bytes() == before


def test_an_open_file_outlives_its_replacement(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "x")
    held = Tensors.of_file(TensorFile(tmp_path / "x"))
    save_file({"a": torch.zeros(30)}, tmp_path / "y")
    (tmp_path / "y").replace(tmp_path / "x")
    assert held["a"].tolist() == [1.0, 1.0, 1.0]


def test_a_mapping_like_any_other():
    held = Tensors.of({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
    assert set(held) == {"a", "b"}
    assert len(held) == 2
    assert "a" in held
    assert "c" not in held
    assert held.get("c") is None
    assert held.weights == 10
    with pytest.raises(KeyError):
        held["c"]


def test_unknown_dtypes_are_refused(tmp_path: Path):
    with pytest.raises(IVONError, match="complex64"):
        Tensors.of({"a": torch.zeros(1, dtype=torch.complex64)})
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x")
    with pytest.raises(IVONError, match="F8_E4M3"):
        Tensors.of_file(TensorFile(tmp_path / "x"))


def test_progress_adds_up_to_all_weights():
    held = Tensors.of({str(i): torch.zeros(i, 3) for i in range(9)})
    heard: list[tuple[str, int, int]] = []
    assert held.each(lambda key: held[key].shape[0], "counting", lambda *report: heard.append(report)) == {
        str(i): i for i in range(9)
    }
    assert {(doing, total) for doing, _, total in heard} == {("counting", held.weights)}
    assert sum(count for _, count, _ in heard) == held.weights
