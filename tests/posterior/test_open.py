"""Adapters with and without σ, opened as posteriors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.open import open_posterior


def test_an_adapter_with_sigma_is_its_posterior(tiny_adapter: Path) -> None:
    expected = Posterior.from_pretrained(tiny_adapter)
    for mean_only in (False, True):
        found = open_posterior(tiny_adapter, mean_only)
        assert all(found.sigma[key].equal(expected.sigma[key]) for key in expected.sigma)


def test_an_adapter_without_sigma_has_no_width(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter(sigma=False)
    found = open_posterior(folder, mean_only=True)
    assert found.mean.keys() == found.sigma.keys()
    assert not any(found.sigma[key].any() for key in found.sigma)
    assert all(found.sigma[key].shape == found.mean[key].shape for key in found.mean)
    with pytest.raises(IVONError, match=r"has no ivon_sigma.safetensors, so there are no draws and no pruning"):
        open_posterior(folder)
