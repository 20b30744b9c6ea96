"""Descriptions, diagnoses and distances of adapters are held against torch's own figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.inspect.diagnosis import diagnose
from axolotl_ivon.inspect.diff import distance
from axolotl_ivon.inspect.info import QUANTILES, describe


def test_numbers_are_those_of_all_weights(tiny_adapter: Path):
    summary = describe(tiny_adapter, ratio=0.3)
    q = Posterior.from_pretrained(tiny_adapter)
    sigma = torch.cat([value.flatten() for value in q.sigma.values()])
    snr = torch.cat([(q.mean[key].abs() / q.sigma[key]).flatten() for key in q.sigma])
    assert (summary["tensors"], summary["weights"], summary["weights_with_sigma"]) == (8, len(sigma), len(sigma))
    for name, values in (("sigma", sigma), ("snr", snr)):
        for quantile in QUANTILES:
            # Bins are 0.2 % wide; the quantile of so few weights may be the next one.
            near = torch.quantile(values, max(0, quantile - 2 / len(values)))
            far = torch.quantile(values, min(1, quantile + 2 / len(values)))
            assert 0.998 * near <= summary[name][f"{quantile:g}"] <= 1.002 * far
    edges = torch.tensor(summary["snr_histogram"]["log10_edges"])
    expected = torch.bincount(torch.bucketize(snr.log10(), edges), minlength=len(edges) + 1)
    assert summary["snr_histogram"]["counts"] == expected.tolist()
    assert summary["would_prune"] == round(0.3 * len(sigma))


def test_modules_hold_their_own_weights(tiny_adapter: Path):
    summary = describe(tiny_adapter, ratio=0.3, criterion="magnitude")
    q = Posterior.from_pretrained(tiny_adapter)
    pruned = q.prune(0.3, "magnitude")
    assert [row["module"] for row in summary["modules"]] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    for row in summary["modules"]:
        keys = [key for key in q.mean if f".{row['module']}." in key]
        assert len(keys) == 2
        sigma = torch.cat([q.sigma[key].flatten() for key in keys]).double()
        assert row["weights"] == len(sigma)
        assert row["sigma_median"] == pytest.approx(float(sigma.quantile(0.5)))
        off = torch.cat([(pruned.sigma[key] == 0).flatten() for key in keys])
        assert row["pruned"] == pytest.approx(float(off.double().mean()))


def test_only_weights_with_noise_are_in_the_statistics(tiny_adapter: Path, plain_adapter: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter)
    q.prune(0.5).save_pretrained(tmp_path / "pruned")
    summary = describe(tmp_path / "pruned")
    assert summary["weights_with_sigma"] == summary["would_prune"] == summary["weights"] // 2
    assert summary["sigma"]["0"] > 0.009
    q.temper(math.inf).save_pretrained(tmp_path / "point")
    summary = describe(tmp_path / "point")
    assert (summary["weights_with_sigma"], summary["sigma"], summary["would_prune"]) == (0, {}, 0)
    assert {row["sigma_median"] for row in summary["modules"]} == {None}
    summary = describe(plain_adapter)
    assert summary["posterior"] is False
    assert summary["weights"] == sum(row["weights"] for row in summary["modules"])


def test_the_figures_of_an_adapter_and_of_its_training(tiny_adapter: Path, make_adapter: Callable[..., Path]) -> None:
    found = diagnose(tiny_adapter)
    q = Posterior.from_pretrained(tiny_adapter)
    logs = {key: sigma.double().log() for key, sigma in q.sigma.items()}
    weights = sum(value.numel() for value in logs.values())
    spread = sum(value.std(correction=0) * value.numel() for value in logs.values()) / weights
    assert found["log_sigma_spread"] == pytest.approx(float(spread), rel=1e-6)
    b = torch.cat([value.flatten() for key, value in q.mean.items() if "lora_B" in key])
    assert found["moved"] == pytest.approx(b.abs().mean().item(), rel=1e-5)
    assert found["allowed"] is None
    # σ² against the variance of a fresh A, which PEFT draws uniformly from ±1/√inputs.
    noise = 0.0
    for key, sigma in q.sigma.items():
        if "lora_A" in key:
            fresh = torch.nn.Linear(sigma.shape[1], 20_000, bias=False).weight
            noise += float(sigma.square().mean() / fresh.detach().var())
    assert found["noise"] == pytest.approx(noise, rel=0.01)
    assert [one["about"] for one in found["findings"]] == ["weights", "sigma", "draws"]
    assert (found["steps"], found["ess"], found["tau"]) == (10, 1000.0, 1.0)
    found = diagnose(make_adapter(facts={"moved": "0.0001", "travel": "0.0003", "beta2": "ten", "steps": "nan"}))
    assert (found["moved"], found["allowed"], found["beta2"], found["steps"]) == (1e-4, 3e-4, None, None)
    assert "33% of the 0.0003" in found["findings"][0]["text"]


def test_a_run_that_did_not_begin_at_zero_has_not_moved_from_there(make_adapter: Callable[..., Path]) -> None:
    found = diagnose(make_adapter(facts={"travel": "0.0003"}))
    assert (found["moved"], found["allowed"]) == (None, 3e-4)
    assert [one["about"] for one in found["findings"]] == ["sigma", "draws"]


@pytest.mark.parametrize(("ess", "good"), [(1e3, True), (1e2, False)])
def test_draws_that_may_cost_more_than_a_nat_are_no_good_news(
    ess: float, good: bool, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(facts={"hessian": "squared_gradients", "ess": str(ess)})
    weights = Posterior.from_pretrained(folder).mean.weights
    finding = diagnose(folder)["findings"][-1]
    assert f"by at most about {weights / (2 * ess):.2g} nats" in finding["text"]
    assert (finding["good"], "may destroy" in finding["text"]) == (good, not good)


def test_draws_that_training_narrowed_to_the_mean_are_said_to_be(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    wide = Posterior.from_pretrained(make_adapter(facts={"hessian": "squared_gradients", "ess": "100000"}))
    text = "training narrowed the draws by τ 1600, so they hardly differ from the mean: a further τ of "

    def draws(tau: float, training_tau: float, header_tau: float | None = None) -> tuple[bool, str]:
        q = wide.temper(tau)
        taus = {"tau": str(header_tau or tau), "training_tau": str(training_tau)}
        q = replace(q, metadata={**q.metadata, **taus})
        q.save_pretrained(tmp_path / "q", overwrite=True)
        finding = diagnose(tmp_path / "q")["findings"][-1]
        return finding["good"], finding["text"].partition("; ")[2]

    assert draws(1600, 1600) == (True, f"{text}0.000625 undoes all narrowing")
    assert draws(4800, 1600) == (True, f"{text}0.000208 undoes all narrowing")
    assert draws(1, 1600) == draws(1600, 1) == (True, "")
    assert draws(1e-3, 2, header_tau=2) == (True, ""), "wide for all that"


def test_pruned_weights_take_no_part_and_a_point_has_no_draws(tiny_adapter: Path, tmp_path: Path) -> None:
    q = Posterior.from_pretrained(tiny_adapter)
    q.prune(0.5).save_pretrained(tmp_path / "pruned")
    assert math.isfinite(diagnose(tmp_path / "pruned")["log_sigma_spread"])
    q.temper(math.inf).save_pretrained(tmp_path / "point")
    found = diagnose(tmp_path / "point")
    assert (found["log_sigma_spread"], found["noise"], found["tau"]) == (None, None, "inf")
    assert "no draws" in found["findings"][-1]["text"]
    q.temper(1e4).save_pretrained(tmp_path / "narrow")
    assert "hardly differ from the mean" in diagnose(tmp_path / "narrow")["findings"][-1]["text"]
    q.temper(1e-4).save_pretrained(tmp_path / "wide")
    assert "may destroy it" in diagnose(tmp_path / "wide")["findings"][-1]["text"]


PREFIX = "base_model.model.model.layers."


def posterior(seed: int) -> Posterior:
    torch.manual_seed(seed)
    names = [f"{PREFIX}{layer}.q_proj.lora_{factor}.weight" for layer in (10, 2) for factor in "AB"]
    mean = {name: torch.randn(6, 4) for name in names}
    return Posterior(mean, {name: torch.rand(6, 4) + 0.05 for name in names}, {}, {})


def test_distances_of_random_posteriors():
    a, b = posterior(0), posterior(1)
    result = distance(a, b)
    assert [row["module"] for row in result["modules"]] == ["model.layers.2.q_proj", "model.layers.10.q_proj"]
    for row in result["modules"]:
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
    assert result["kl_ab"] == pytest.approx(sum(row["kl_ab"] for row in result["modules"]))
    assert result["weights"] == 96


def test_what_is_equal_or_pruned_is_counted():
    q = posterior(0)
    same, quarter, everything = (distance(q, other) for other in (q, q.prune(0.25), q.prune(1.0)))
    assert (same["kl_ab"], same["kl_ba"], same["apart"], same["one_sided"]) == (0, 0, 0, 0)
    assert same["cosine"] == pytest.approx(1)
    assert (quarter["one_sided"], quarter["kl_ab"], quarter["kl_ba"]) == (0.25, 0, 0)
    assert (everything["one_sided"], everything["cosine"]) == (1, None)


def test_other_tensors_have_no_distance():
    a, key = posterior(0), f"{PREFIX}2.q_proj.lora_A.weight"
    less = Posterior(*({k: v for k, v in tensors.items() if k != key} for tensors in (a.mean, a.sigma)), {}, {})
    with pytest.raises(IVONError, match=r"lora_A.weight: A has shape \[6, 4\], B has none such"):
        distance(a, less)
    with pytest.raises(IVONError, match=r"lora_A.weight: A has none such, B has shape \[6, 4\]"):
        distance(less, a)
