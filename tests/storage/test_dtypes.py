"""The table of dtypes is held against torch, which has them all, and against safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from axolotl_ivon.storage.dtypes import CHOICES, FLOATS, NUMPY, SAFETENSORS

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


def test_users_choose_among_floats():
    assert {SAFETENSORS[name] for name in CHOICES} < set(FLOATS)


@given(st.lists(finite, min_size=1, max_size=50), st.sampled_from(FLOATS))
def test_rounding_is_that_of_torch(values: list[float], dtype: str):
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(getattr(torch, NUMPY[dtype].name))
    with np.errstate(over="ignore"):
        rounded = array.astype(NUMPY[dtype])
    assert torch.equal(in_torch(rounded), expected)
    assert torch.equal(torch.from_numpy(rounded.astype(np.float32)), expected.float())


def test_bfloat16_of_a_million_bit_patterns():
    """Every exponent, halves that are ties and halves that are not, subnormals and infinities."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    values = np.concatenate([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16)
    assert torch.equal(torch.from_numpy(values.astype(NUMPY["BF16"]).view(np.int16)), expected)
    wide = values[np.isfinite(values)].astype(np.float64)
    wide = np.concatenate([wide, np.nextafter(wide, 0), np.nextafter(wide, np.inf)])
    expected = torch.from_numpy(wide).bfloat16().view(torch.int16)
    assert torch.equal(torch.from_numpy(wide.astype(NUMPY["BF16"]).view(np.int16)), expected)


def test_ties_round_to_even_in_bfloat16():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000], np.uint32).view(np.float32)
    assert halfway.astype(NUMPY["BF16"]).view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]
