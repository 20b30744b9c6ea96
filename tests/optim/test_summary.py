"""What a log tells of the posterior, against closed forms in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from toy import SETTINGS, batches, lora_loss, lora_pair

from axolotl_ivon import IVONLoRA


def trained(steps: int, **changes: object) -> tuple[IVONLoRA, dict[str, nn.Parameter]]:
    """Return an optimizer whose tensors are in one part, in several, of another dtype, and in a group of its own."""
    pair = {**lora_pair(), "half": lora_pair(3, torch.bfloat16)["A"], "one": nn.Parameter(torch.ones(()))}
    own, old = nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(9, 6))
    yesterday = torch.linspace(-0.1, 0.1, 54).view(9, 6), torch.linspace(1e-3, 0.2, 54).view(9, 6)
    groups = [
        {"params": [*pair.items()]},
        {"params": [("own", own)], "ess": 1e2, "clip": 0.5, "prior": 0.25},
        {"params": [("old", old)], "prior": {"old": yesterday}, "prior_strength": 0.5},
    ]
    optimizer = IVONLoRA(groups, **{**SETTINGS, **changes})
    for buffers in optimizer._get_buffers():
        buffers.limit = 30
    for batch in batches(steps):
        with optimizer.sampled_params():
            loss = lora_loss(pair, batch) + pair["half"].float().sin().sum() + pair["one"].square()
            (loss + (own.cumsum(1) - 2).square().sum() + (old - 0.3).square().sum() * 1e-2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, {**pair, "own": own, "old": old}


def in_float64(optimizer: IVONLoRA) -> dict[str, float]:
    """Compute every figure from m, g, p and t by torch's own distributions and numpy's own statistics."""
    sigmas, ratios, spread, clipped, kl = [], [], 0.0, 0, 0.0
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = {name: value.double() for name, value in optimizer.state[param].items()}
            sigma = 1 / (group["ess"] * state["precision"]).sqrt()
            sigmas.append(sigma.numpy().ravel())
            ratios.append((state["mean"].abs() / sigma).numpy().ravel())
            spread += np.log(sigma.numpy()).std() * sigma.numel()
            precision, center = 1 / (state["mean"] ** 2 + sigma**2).mean(), torch.zeros_like(sigma)
            if group["prior"] == "gaussian":
                precision, center = state["prior_precision"] * group["prior_strength"], state["prior_mean"]
            elif group["prior"] != "empirical":
                precision = torch.tensor(group["ess"] * group["prior"], dtype=torch.float64)
            prior = Normal(center, (1 / precision.sqrt()).expand_as(sigma))
            kl += float(kl_divergence(Normal(state["mean"], sigma), prior).sum())
            direction = state["momentum"] / (1 - group["betas"][0] ** state["step"])
            if group["prior"] != "empirical":
                direction = direction + precision / group["ess"] * (state["mean"] - center)
            clipped += int(((direction / state["precision"]).abs() >= group["clip"]).sum())
    weights = sum(map(len, sigmas))
    return {
        "ivon_sigma_mean": np.concatenate(sigmas).mean(),
        "ivon_snr_mean": np.concatenate(ratios).mean(),
        "ivon_log_sigma_spread": spread / weights,
        "ivon_clipped_share": clipped / weights,
        "ivon_kl": kl,
        "ivon_ess": SETTINGS["ess"],
    }


@pytest.mark.parametrize("kernels", ["plain", "cpu"])
@pytest.mark.parametrize("clip", [0.4, 2.0])
def test_every_figure_is_the_closed_form(kernels: str, clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVON_KERNELS", kernels)
    optimizer, _ = trained(12, clip=clip)
    expected = in_float64(optimizer)
    assert optimizer.summary() == pytest.approx(expected, rel=1e-4)
    assert 0.05 < expected["ivon_clipped_share"] < 0.95, "all or none would say little"
    assert expected["ivon_log_sigma_spread"] > 1e-3
    assert expected["ivon_kl"] > 1


def test_at_the_start_sigma_is_the_same_within_a_tensor_and_nothing_was_clipped() -> None:
    optimizer, params = trained(0)
    summary = optimizer.summary()
    of_yesterday = in_float64(optimizer)["ivon_log_sigma_spread"]  # the one σ that was learned before
    assert summary["ivon_log_sigma_spread"] == pytest.approx(of_yesterday, rel=1e-3)
    del optimizer.param_groups[2]
    optimizer._buffers = None
    summary = optimizer.summary()
    assert summary["ivon_log_sigma_spread"] < 1e-4
    assert summary["ivon_clipped_share"] == 0
    # The closed form where m = 0: p = 2·h0 and δ = p, so that q is the prior.
    alone = IVONLoRA([nn.Parameter(torch.zeros(7, 3))], **SETTINGS)
    alone._get_buffers()[0].precision.fill_(2 * SETTINGS["h0"])
    assert alone.summary()["ivon_kl"] == pytest.approx(0, abs=1e-4)
    assert params


def test_small_spreads_are_told_from_none() -> None:
    """p of a tensor spreads by so little that a sum of squares of log p would lose it in float32."""
    param = nn.Parameter(torch.zeros(400, 400))
    optimizer = IVONLoRA([param], **SETTINGS)
    wanted = 2e-3
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(0)).flatten()
    optimizer._get_buffers()[0].precision.copy_(0.1 * (wanted * 2 * noise).exp())
    assert optimizer.summary()["ivon_log_sigma_spread"] == pytest.approx(wanted, rel=1e-2)


def test_a_prior_that_is_no_distribution_has_no_divergence_and_no_clip_clips_nothing() -> None:
    optimizer, _ = trained(2, prior=0.0, clip=math.inf)
    optimizer.param_groups[1]["clip"] = math.inf
    summary = optimizer.summary()
    assert "ivon_kl" not in summary
    assert summary["ivon_clipped_share"] == 0
    assert IVONLoRA([nn.Parameter(torch.zeros(0, 3))], **SETTINGS).summary()["ivon_sigma_mean"] == 0
