"""Raw arrays are held against torch, which has all the dtypes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from heard import Heard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from axolotl_ivon import IVONError
from axolotl_ivon.posterior.tensors import Tensors, in_threads, write_tensors
from axolotl_ivon.storage.tensorfile import TensorFile

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from([*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
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


def test_a_mapping_like_any_other():
    held = Tensors.of({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
    assert (set(held), len(held), held.weights) == ({"a", "b"}, 2, 10)
    assert "c" not in held
    assert held.get("c") is None


def test_unknown_dtypes_are_refused(tmp_path: Path):
    with pytest.raises(IVONError, match="complex64"):
        Tensors.of({"a": torch.zeros(1, dtype=torch.complex64)})
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x")
    with pytest.raises(IVONError, match="F8_E4M3"):
        Tensors.of_file(TensorFile(tmp_path / "x"))


def test_progress_adds_up_to_all_weights():
    held = Tensors.of({str(i): torch.zeros(i, 3) for i in range(9)})
    heard = Heard()
    assert held.each(lambda key: held[key].shape[0], "counting", heard) == {str(i): i for i in range(9)}
    assert {total for _, total in heard.counts["counting"]} == {held.weights}
    assert sum(count for count, _ in heard.counts["counting"]) == held.weights


def test_threads_keep_the_order_and_pass_errors_on():
    def work(key: str) -> int:
        time.sleep(0.01 * (5 - int(key)))
        if key == "4":
            raise IVONError("four")
        return int(key)

    assert list(in_threads(work, "0123")) == [0, 1, 2, 3]
    with pytest.raises(IVONError, match="four"):
        list(in_threads(work, "01234"))
