"""Batches hold every example once an epoch, within their limits."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.fitting.batches import _LOGITS, Batches


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
    batches = Batches(items([10] * 8), None, "cuda", _LOGITS // 20)
    assert [len(batch) for batch in batches.once()] == [2, 2, 2, 2]
