"""The normals are checked against numpy's and against the normal distribution itself."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import pytest

from axolotl_ivon.drawing import generator, normals


def test_moments_are_those_of_the_normal_distribution():
    x = normals(4_000_000, "test", 0).astype(np.float64)
    # Six standard errors of each moment's estimate.
    assert abs(x.mean()) < 6 * math.sqrt(1 / x.size)
    assert abs(x.var() - 1) < 6 * math.sqrt(2 / x.size)
    assert abs((x**3).mean()) < 6 * math.sqrt(15 / x.size)
    assert abs((x**4).mean() - 3) < 6 * math.sqrt(96 / x.size)


def test_distribution_is_normal_by_kolmogorov_and_smirnov():
    x = np.sort(normals(100_000, "test", 1)).astype(np.float64)
    expected = np.array([NormalDist().cdf(value) for value in x])
    steps = np.arange(1, x.size + 1) / x.size
    distance = max(np.abs(steps - expected).max(), np.abs(steps - 1 / x.size - expected).max())
    assert distance < 1.95 / math.sqrt(x.size)  # the quantile of the statistic at 0.999


def test_tails_are_there():
    x = normals(4_000_000, "test", 2)
    for bound in (3.0, 4.0):
        expected = 2 * NormalDist().cdf(-bound) * x.size
        assert np.count_nonzero(np.abs(x) > bound) == pytest.approx(expected, abs=6 * math.sqrt(expected))


def test_neighbours_are_independent():
    x = normals(1_000_000, "test", 3).astype(np.float64)
    for lag in (1, 2, 2**13, 2**14, 2**15):
        assert abs((x[:-lag] * x[lag:]).mean()) < 6 / math.sqrt(x.size)
    other = normals(1_000_000, "test", 4).astype(np.float64)
    assert abs((x * other).mean()) < 6 / math.sqrt(x.size)


def test_values_never_change():
    # Ensembles that people drew must come out the same in every later version, on every machine.
    expected = [
        1.1056036949157715,
        1.0806097984313965,
        -1.6353144645690918,
        0.3650926947593689,
        1.8910185098648071,
        0.22205126285552979,
    ]
    np.testing.assert_array_equal(normals(6, "draw", 0, 0, "a"), np.array(expected, np.float32))


def test_a_shorter_stream_is_the_beginning_of_a_longer_one():
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
