"""Quantiles and counts of `ivon-post info` are held against torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from axolotl_ivon import Posterior
from axolotl_ivon.inspect.info import QUANTILES, describe


def test_numbers_are_those_of_all_weights(tiny_adapter: Path):
    facts = describe(tiny_adapter, ratio=0.3)
    q = Posterior.from_pretrained(tiny_adapter)
    sigma = torch.cat([value.flatten() for value in q.sigma.values()])
    snr = torch.cat([(q.mean[key].abs() / q.sigma[key]).flatten() for key in q.sigma])
    assert (facts["tensors"], facts["weights"], facts["weights_with_sigma"]) == (8, len(sigma), len(sigma))
    for name, values in (("sigma", sigma), ("snr", snr)):
        for quantile in QUANTILES:
            # Bins are 0.2 % wide; the quantile of so few weights may be the next one.
            near = torch.quantile(values, max(0, quantile - 2 / len(values)))
            far = torch.quantile(values, min(1, quantile + 2 / len(values)))
            assert 0.998 * near <= facts[name][f"{quantile:g}"] <= 1.002 * far
    edges = torch.tensor(facts["snr_histogram"]["log10_edges"])
    expected = torch.bincount(torch.bucketize(snr.log10(), edges), minlength=len(edges) + 1)
    assert facts["snr_histogram"]["counts"] == expected.tolist()
    assert facts["would_prune"] == round(0.3 * len(sigma))


def test_modules_hold_their_own_weights(tiny_adapter: Path):
    facts = describe(tiny_adapter, ratio=0.3, criterion="magnitude")
    q = Posterior.from_pretrained(tiny_adapter)
    pruned = q.prune(0.3, "magnitude")
    assert [row["module"] for row in facts["modules"]] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    for row in facts["modules"]:
        keys = [key for key in q.mean if f".{row['module']}." in key]
        assert len(keys) == 2
        sigma = torch.cat([q.sigma[key].flatten() for key in keys]).double()
        assert row["weights"] == len(sigma)
        assert row["sigma_median"] == pytest.approx(float(sigma.quantile(0.5)))
        off = torch.cat([(pruned.sigma[key] == 0).flatten() for key in keys])
        assert row["pruned"] == pytest.approx(float(off.double().mean()))


def test_pruned_weights_take_no_part_in_the_statistics(tiny_adapter: Path, tmp_path: Path):
    Posterior.from_pretrained(tiny_adapter).prune(0.5).save_pretrained(tmp_path / "out")
    facts = describe(tmp_path / "out")
    assert facts["weights_with_sigma"] == facts["weights"] // 2
    assert facts["sigma"]["0"] > 0.009
    assert facts["would_prune"] == facts["weights"] // 2


def test_a_point_has_no_statistics(tiny_adapter: Path, tmp_path: Path):
    Posterior.from_pretrained(tiny_adapter).temper(float("inf")).save_pretrained(tmp_path / "out")
    facts = describe(tmp_path / "out")
    assert (facts["weights_with_sigma"], facts["sigma"], facts["would_prune"]) == (0, {}, 0)
    assert {row["sigma_median"] for row in facts["modules"]} == {None}


def test_without_sigma_the_adapter_is_described(make_adapter: Callable):
    facts = describe(make_adapter(sigma=False))
    assert facts["posterior"] is False
    assert facts["weights"] == sum(row["weights"] for row in facts["modules"])
