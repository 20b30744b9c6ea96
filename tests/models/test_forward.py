"""Names of arguments, and batches that are halved until they fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from axolotl_ivon import IVONError
from axolotl_ivon.models.forward import cache_name, forward_parameters, run_halving


def model(forward: Any) -> Any:
    return SimpleNamespace(get_base_model=lambda: SimpleNamespace(forward=forward))


def test_the_cache_is_called_as_the_signature_says() -> None:
    assert cache_name(forward_parameters(model(lambda input_ids, cache=None: None))) == "cache"
    assert cache_name(forward_parameters(model(lambda input_ids, past_key_values=None: None))) == "past_key_values"
    assert cache_name(forward_parameters(model(lambda input_ids: None))) == "past_key_values"


def test_the_size_is_halved_until_it_fits() -> None:
    sizes, told = [], []

    def run(size: int) -> int:
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return 10 * size

    assert run_halving(run, 13, "prompts", told.append, "") == (30, 3)
    assert sizes == [13, 6, 3]
    assert told == [f"out of memory with {n} prompts in a batch; going on with {n // 2}" for n in (13, 6)]


def test_one_that_does_not_fit_and_other_errors_are_told() -> None:
    def too_large(size: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def broken(size: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(IVONError, match=r"^out of memory with a single prompt of 9 tokens"):
        run_halving(too_large, 5, "prompts", lambda message: None, "prompt of 9 tokens")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_halving(broken, 5, "prompts", lambda message: None, "")
