"""Distances are held against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.inspect.diff import distance

PREFIX = "base_model.model.model.layers."


def posterior(seed: int) -> Posterior:
    torch.manual_seed(seed)
    names = [f"{PREFIX}{layer}.q_proj.lora_{factor}.weight" for layer in (10, 2) for factor in "AB"]
    mean = {name: torch.randn(6, 4) for name in names}
    return Posterior(mean, {name: torch.rand(6, 4) + 0.05 for name in names}, {}, {})


def test_distances_of_random_posteriors():
    a, b = posterior(0), posterior(1)
    facts = distance(a, b)
    assert [row["module"] for row in facts["modules"]] == ["model.layers.2.q_proj", "model.layers.10.q_proj"]
    for row in facts["modules"]:
        keys = [key for key in a.mean if row["module"] in key]

        def flat(tensors: object, keys: list[str] = keys) -> torch.Tensor:
            return torch.cat([tensors[key].flatten() for key in keys]).double()  # type: ignore[index]

        p, q = Normal(flat(a.mean), flat(a.sigma)), Normal(flat(b.mean), flat(b.sigma))
        assert row["weights"] == 48
        assert row["kl_ab"] == pytest.approx(float(kl_divergence(p, q).sum()))
        assert row["kl_ba"] == pytest.approx(float(kl_divergence(q, p).sum()))
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(p.mean, q.mean, dim=0)))
        apart = (p.mean - q.mean).abs() > (p.variance + q.variance).sqrt()
        assert row["apart"] == pytest.approx(float(apart.double().mean()))
        assert row["one_sided"] == 0
    assert facts["kl_ab"] == pytest.approx(sum(row["kl_ab"] for row in facts["modules"]))
    assert facts["weights"] == 96


def test_a_posterior_is_at_no_distance_from_itself():
    q = posterior(0)
    facts = distance(q, q)
    assert (facts["kl_ab"], facts["kl_ba"], facts["apart"], facts["one_sided"]) == (0, 0, 0, 0)
    assert facts["cosine"] == pytest.approx(1)


def test_pruned_weights_are_counted_apart():
    q = posterior(0)
    facts = distance(q, q.prune(0.25))
    assert facts["one_sided"] == 0.25
    assert facts["kl_ab"] == facts["kl_ba"] == 0
    everything = distance(q, q.prune(1.0))
    assert everything["one_sided"] == 1
    assert everything["cosine"] is None


def test_other_tensors_have_no_distance():
    q = posterior(0)
    mean, sigma = dict(q.mean), dict(q.sigma)
    key = mean.popitem()[0]
    sigma.pop(key)
    with pytest.raises(IVONError, match=f"differ in {key}"):
        distance(q, Posterior(mean, sigma, {}, {}))


def test_what_differs_is_said_of_either():
    a, b = posterior(0), posterior(0)
    key = f"{PREFIX}2.q_proj.lora_A.weight"
    less = Posterior(
        {k: v for k, v in b.mean.items() if k != key}, {k: v for k, v in b.sigma.items() if k != key}, {}, {}
    )
    with pytest.raises(IVONError, match=r"lora_A.weight: A has shape \[6, 4\], B has none such"):
        distance(a, less)
    with pytest.raises(IVONError, match=r"lora_A.weight: A has none such, B has shape \[6, 4\]"):
        distance(less, a)
