"""The choice of weights is held against sorting them all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.plugins import plugin_manager
from axolotl_ivon.posterior import default_hooks, prune
from axolotl_ivon.posterior.prune import CRITERIA, Pruning, criteria

# Few different values, so that ties are everywhere; zeros, so that some weights are pruned already.
means = st.lists(st.sampled_from([0.0, -0.0, 0.25, -0.25, 1.0, -3.0]), min_size=1, max_size=12)
sigmas = st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def posteriors(draw: Callable) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    mean, sigma = {}, {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        values = draw(means)
        mean[name] = torch.tensor(values)
        sigma[name] = torch.tensor(draw(st.lists(sigmas, min_size=len(values), max_size=len(values))))
    return mean, sigma


def score(criterion: str, m: float, s: float) -> float:
    """The criteria, once more, for one weight."""
    if m == 0 and s == 0:
        return -np.inf
    if criterion == "snr":
        return np.inf if s == 0 else float(np.float32(abs(m)) / np.float32(s))
    return {"sigma": -s, "magnitude": abs(m)}[criterion]


def brute_force(
    mean: dict[str, torch.Tensor], sigma: dict[str, torch.Tensor], ratio: float, criterion: str, scope: str
) -> set[tuple[str, int]]:
    """Which weights go: all of them sorted by score, name and place."""
    ranked: dict[str, list[tuple[float, str, int]]] = {}
    for name in mean:
        if not sigma[name].any() and mean[name].any():
            continue  # not trained
        for i, (m, s) in enumerate(zip(mean[name].tolist(), sigma[name].tolist(), strict=True)):
            group = "" if scope == "adapter" else name
            ranked.setdefault(group, []).append((score(criterion, m, s), name, i))
    return {(name, i) for rows in ranked.values() for _, name, i in sorted(rows)[: round(ratio * len(rows))]}


@settings(max_examples=300)
@given(
    posteriors(),
    st.floats(0, 1),
    st.sampled_from(["snr", "sigma", "magnitude"]),
    st.sampled_from(["adapter", "tensor"]),
)
def test_exactly_the_lowest_are_chosen(posterior: tuple, ratio: float, criterion: str, scope: str):
    mean, sigma = posterior
    q = Posterior(*copy.deepcopy(posterior), {}, {})
    trained = [name for name in mean if sigma[name].any() or not mean[name].any()]
    if not trained and ratio > 0:
        with pytest.raises(IVONError, match="σ is 0 everywhere"):
            q.prune(ratio, criterion, scope)
        return
    p = q.prune(ratio, criterion, scope)
    for name, place in brute_force(mean, sigma, ratio, criterion, scope):
        mean[name][place] = sigma[name][place] = 0
    for name in mean:
        assert torch.equal(p.mean[name], mean[name])
        assert torch.equal(p.sigma[name], sigma[name])
        off = (mean[name] == 0) & (sigma[name] == 0)
        assert p.pruned()[name] == (int(off.sum()) if name in trained else 0)


@pytest.mark.parametrize("arrangement", ["random", "sorted", "ties", "two values", "one place", "infinite"])
def test_the_lowest_of_many(arrangement: str):
    """The path for large adapters, which samples: an arrangement may mislead the sample, but not the result."""
    rng = np.random.default_rng(0)
    values = {
        "random": lambda: rng.standard_normal(50_000),
        "sorted": lambda: np.arange(50_000),
        "ties": lambda: rng.integers(0, 4, 50_000),
        "two values": lambda: np.where(np.arange(50_000) % 61 == 0, 0, 1),  # the sample sees only one of them
        "one place": lambda: np.where(np.arange(50_000) == 7, -1, 3),
        "infinite": lambda: np.where(rng.random(50_000) < 0.3, -np.inf, np.where(rng.random(50_000) < 0.5, np.inf, 0)),
    }[arrangement]()
    values = values.astype(np.float32)
    parts = dict(zip("abcde", np.array_split(values, 5), strict=True))
    in_order = np.argsort(values, kind="stable")
    done: list[str] = []

    def scores(key: str, step: int = 1) -> np.ndarray:
        return parts[key][::step]

    for count in (1, 2, 819, 820, 25_000, 49_999, 50_000):
        found = dict(prune._lowest(list(parts), scores, count, weights=2**23, done=done.append))
        mask = np.concatenate([np.unpackbits(found[key][0], count=len(parts[key])) for key in parts])
        assert np.array_equal(np.flatnonzero(mask), np.sort(in_order[:count]))
        for key, (bits, zeros) in found.items():
            # −∞ stands for a weight that was pruned before, which stays so.
            both = np.unpackbits(bits, count=len(parts[key])).astype(bool) | (parts[key] == -np.inf)
            assert zeros == both.sum()
    assert set(done) == set(parts)


def test_random_pruning_depends_on_its_seed_alone():
    def kept(seed: int, names: str = "ab") -> torch.Tensor:
        ones = {name: torch.ones(500) for name in names}
        pruned = Posterior(ones, ones, {}, {}).prune(0.3, "random", seed=seed)
        return torch.stack([pruned.mean[name] for name in "ab"])

    first = kept(1)
    assert first.sum() == 700
    assert torch.equal(first, kept(1, "ba"))
    assert not torch.equal(first, kept(2))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ((-0.1,), "ratio"),
        ((1.5,), "ratio"),
        ((float("nan"),), "ratio"),
        ((0.1, "best"), "criterion"),
        ((0.1, "snr", "layer"), "scope"),
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused(arguments: tuple, parameter: str):
    with pytest.raises(IVONError) as error:
        Pruning(*arguments)
    assert error.value.parameter == parameter


def test_the_criteria_that_ship_come_through_the_hook():
    assert plugin_manager().is_registered(default_hooks)
    assert default_hooks.pruning_criteria() == CRITERIA
    assert criteria().items() >= CRITERIA.items()
    assert list(CRITERIA) == ["snr", "sigma", "magnitude", "random"]


@pytest.mark.parametrize("bad", [lambda m: m * np.nan, lambda m: m - np.inf, lambda m: m[:1]])
def test_criteria_that_misbehave_are_named(monkeypatch: pytest.MonkeyPatch, bad: Callable):
    monkeypatch.setitem(CRITERIA, "mine", lambda name, mean, sigma, random: bad(mean))
    with pytest.raises(IVONError, match="criterion 'mine' gave"):
        Posterior({"a": torch.ones(4)}, {"a": torch.ones(4)}, {}, {}).prune(0.5, "mine")
