"""Batches hold every example once an epoch, within their limits, and halve when the memory runs out."""

from __future__ import annotations

import itertools

import pytest
import torch
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.models.batching import GRADIENT_LOGITS, Batches, Halving, batch_tokens, out_of_memory


def items(lengths: list[int]) -> list[EncodedExample]:
    return [EncodedExample(list(range(n)), list(range(n)), [i] * n) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.sampled_from([None, 1, 3, 100]), st.integers(0, 5))
def test_an_epoch_has_every_example_once(lengths: list[int], size: int | None, seed: int) -> None:
    held = items(lengths)
    batches = Batches(held, size, "cpu", 10)
    once = batches.once()
    assert sorted(item.targets[0] for batch in once for item in batch) == list(range(len(held)))
    epoch = list(itertools.islice((item for batch in batches.endless(seed) for item in batch), 2 * len(held)))
    for part in (epoch[: len(held)], epoch[len(held) :]):
        assert sorted(item.targets[0] for item in part) == list(range(len(held)))
    for batch in once:
        if size is None:
            assert len(batch) == 1 or len(batch) * max(len(item.ids) for item in batch) <= 512
        else:
            assert len(batch) <= size


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    batches = Batches(items(list(range(1, 30))), 4, "cpu", 10)

    def epochs(seed: int) -> list[list[int]]:
        flat = [item.targets[0] for batch in itertools.islice(batches.endless(seed), 16) for item in batch]
        return [flat[:29], flat[29:58]]

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1)
    assert epochs(0)[0] != epochs(0)[1]


def test_logits_are_limited() -> None:
    batches = Batches(items([10] * 8), None, "cuda", GRADIENT_LOGITS // 20)
    assert [len(batch) for batch in batches.once()] == [2, 2, 2, 2]
    assert batch_tokens("cuda") > batch_tokens("cuda", gradients=True) > batch_tokens("cpu")
    assert batch_tokens("cpu", gradients=True) == batch_tokens("cpu")


class Memory:
    """Work that takes a number of units each, on a device that has some."""

    def __init__(self, units: int, each: int = 1) -> None:
        self.units, self.each, self.sizes = units, each, list[int]()

    def __call__(self, start: int, stop: int) -> tuple[int, int]:
        self.sizes.append(stop - start)
        if (stop - start) * self.each > self.units:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return start, stop


def test_the_size_is_halved_until_it_fits_and_what_fitted_is_remembered() -> None:
    heard, work = Heard(), Memory(3)
    halving = Halving("prompts", heard)
    parts = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]
    assert [(start, stop) for start, stop, result in halving(13, work, "") if result == (start, stop)] == parts
    assert work.sizes == [13, 6, 3, 3, 3, 3, 1]
    assert heard.notes == [f"out of memory with {n} prompts in a batch; going on with {n // 2}" for n in (13, 6)]
    assert [(list(part), sum(part)) == (part, result) for part, result in halving.over([1, 2, 3, 4], sum)] == [True] * 2
    assert work.sizes[7:] == []
    assert halving.at_most(8, lambda size: size, "") == (3, 3)


def test_what_fitted_is_a_cost() -> None:
    halving = Halving()
    assert len(list(halving(4, Memory(20, each=10), "", cost=10))) == 2
    assert [stop - start for start, stop, _ in halving(10, Memory(20, each=2), "", cost=2)] == [10]
    assert [stop - start for start, stop, _ in halving(2, Memory(30, each=30), "", cost=30)] == [1, 1]


def test_one_that_does_not_fit_and_other_errors_are_raised() -> None:
    def broken(start: int, stop: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(IVONError, match=r"^out of memory with a single prompt of 9 tokens$"):
        list(Halving()(5, Memory(0), "prompt of 9 tokens"))
    with pytest.raises(IVONError, match=r"^out of memory with a single example; use load_in 8bit or 4bit"):
        list(Halving().over([1, 2], lambda part: Memory(0)(0, len(part))))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(Halving()(5, broken, ""))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
