"""The normals are checked against the normal distribution itself, and their bits against a plain transcription."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from axolotl_ivon.noise import generator, normals, quantiles, random_bits, training_noise

Draw = Callable[..., np.ndarray]


def noise(size: int, *key: object) -> np.ndarray:
    """The stream of training noise whose seed is a hash of `key`."""
    out = np.empty(size, np.float32)
    training_noise(out, *random_bits(repr(key)))
    return out


both = pytest.mark.parametrize("draw", [normals, noise])


@both
def test_moments_and_tails_are_those_of_the_normal_distribution(draw: Draw):
    x = draw(4_000_000, "test", 0).astype(np.float64)
    # Six standard errors of each moment's estimate.
    assert abs(x.mean()) < 6 * math.sqrt(1 / x.size)
    assert abs(x.var() - 1) < 6 * math.sqrt(2 / x.size)
    assert abs((x**3).mean()) < 6 * math.sqrt(15 / x.size)
    assert abs((x**4).mean() - 3) < 6 * math.sqrt(96 / x.size)
    for bound in (3.0, 4.0):
        expected = 2 * NormalDist().cdf(-bound) * x.size
        assert np.count_nonzero(np.abs(x) > bound) == pytest.approx(expected, abs=6 * math.sqrt(expected))


@both
def test_distribution_is_normal_by_kolmogorov_and_smirnov(draw: Draw):
    x = draw(100_000, "test", 1).astype(np.float64)
    assert kstest(x, "norm").statistic < 1.95 / math.sqrt(x.size)  # the quantile of the statistic at 0.999


@both
def test_neighbours_are_independent(draw: Draw):
    x = draw(1_000_000, "test", 3).astype(np.float64)
    for lag in (1, 2, 3, 4, 2**13, 2**14, 2**15):
        assert abs((x[:-lag] * x[lag:]).mean()) < 6 / math.sqrt(x.size)
    other = draw(1_000_000, "test", 4).astype(np.float64)
    assert abs((x * other).mean()) < 6 / math.sqrt(x.size)


def test_values_never_change():
    # Ensembles that people drew must come out the same in every later version, on every machine.
    expected = [1.1056036949157715, 1.0806097984313965, -1.6353144645690918]
    expected += [0.3650926947593689, 1.8910185098648071, 0.22205126285552979]
    np.testing.assert_array_equal(normals(6, "draw", 0, 0, "a"), np.array(expected, np.float32))
    # A shorter stream is the beginning of a longer one.
    np.testing.assert_array_equal(normals(100_001, "a")[:40_003], normals(40_003, "a"))


def test_every_part_of_the_key_counts():
    streams = [("draw", 0, 0, "a"), ("draw", 1, 0, "a"), ("draw", 0, 1, "a"), ("draw", 0, 0, "b"), ("prune", 0, 0, "a")]
    drawn = {normals(8, *key).tobytes() for key in streams}
    assert len(drawn) == len(streams)
    assert generator("a", "bc").random() != generator("ab", "c").random()


def test_threads_do_not_matter():
    keys = list(range(20))
    alone = [normals(50_000, key) for key in keys]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda key: normals(50_000, key), keys))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


U64 = st.integers(0, 2**64 - 1)


@given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=3), start=U64, stride=U64)
def test_training_noise_is_a_hash_of_the_place_looked_up(sizes: list[int], start: int, stride: int):
    def splitmix64(place: int) -> int:
        z = (start + place * (stride | 1)) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    table = quantiles()
    for size in sizes:
        out = np.empty(size, np.float32)
        training_noise(out, np.uint64(start), np.uint64(stride))
        for i in {0, 1, 2, 3, 16_383, 16_384, 32_767, 32_768, size // 2, size - 1} & set(range(size)):
            bits = splitmix64(i // 2) >> 32 * (i % 2)
            assert out[i] == table[bits & 0xFFFF] + table[bits >> 16 & 0xFFFF]


@settings(deadline=None)  # compiling takes its time
@given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=3), pairs=st.lists(st.tuples(U64, U64), min_size=3))
def test_training_noise_is_the_same_compiled(sizes: list[int], pairs: list[tuple[int, int]]):
    import torch

    from axolotl_ivon.optim.kernels import cpu

    seeds = np.array(pairs[: len(sizes)], np.uint64)
    plain = [np.empty(size, np.float32) for size in sizes]
    for part, (start, stride) in zip(plain, seeds, strict=True):
        training_noise(part, start, stride)
    chunk: Any = SimpleNamespace(mean=torch.empty(sum(sizes)), sizes=sizes)
    np.testing.assert_array_equal(cpu.noise(chunk, seeds).numpy(), np.concatenate(plain))


def test_streams_do_not_run_into_each_other():
    # Two streams of one stride whose starts are a few strides apart give the same numbers, shifted by as many.
    stride, apart = 0x9E3779B97F4A7C15, 5
    start = np.uint64(apart * stride % 2**64)
    one, same, other = np.empty((3, 1000), np.float32)
    training_noise(one, np.uint64(0), np.uint64(stride))
    training_noise(same, start, np.uint64(stride))
    np.testing.assert_array_equal(one[2 * apart :], same[: -2 * apart])
    training_noise(other, start, np.uint64(stride + 2))
    assert abs(np.corrcoef(one[2 * apart :], other[: -2 * apart])[0, 1]) < 0.2
