"""What is said of a run, and the figures behind it against torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.inspect.diagnosis import diagnose


def test_the_figures_of_an_adapter(tiny_adapter: Path) -> None:
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
            noise += float(sigma.square().mean() / fresh.var())
    assert found["noise"] == pytest.approx(noise, rel=0.01)
    assert [one["about"] for one in found["findings"]] == ["weights", "sigma", "draws"]
    assert (found["steps"], found["ess"], found["tau"]) == (10, 1000.0, 1.0)


def test_what_training_wrote_goes_before_the_b_matrices(make_adapter: Callable[..., Path]) -> None:
    found = diagnose(make_adapter(facts={"moved": "0.0001", "travel": "0.0003", "beta2": "ten", "steps": "nan"}))
    assert (found["moved"], found["allowed"], found["beta2"], found["steps"]) == (1e-4, 3e-4, None, None)
    assert "33% of the 0.0003" in found["findings"][0]["text"]


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


def test_an_adapter_without_sigma_is_one_line(make_adapter: Callable[..., Path]) -> None:
    with pytest.raises(IVONError, match="has no ivon_sigma"):
        diagnose(make_adapter(sigma=False))
