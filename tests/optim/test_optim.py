"""Flat buffers, threads and the summary: no layout and no thread changes a bit, and every figure is its closed form."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from toy import ADAM, SETTINGS, batches, lora_loss, lora_pair, step_of

from axolotl_ivon import IVONLoRA
from axolotl_ivon.optim.threads import in_parallel

both = pytest.mark.usefixtures("both_kernels")


@both
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_pieces_change_a_bit(
    threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of one piece, of several, and of a part of one, in one thread and in three."""
    shapes = [(5, 3), (40, 30), (7,), (), (1, 900), (0, 4), (33, 20), (2, 2)]

    def train(count: int) -> list[torch.Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        params[1] = nn.Parameter(params[1].detach().T)  # columns are contiguous, not rows
        optimizer = IVONLoRA(params, **SETTINGS)
        for buffers in optimizer._get_buffers():
            buffers.limit = 100
        for _ in range(4):
            with step_of(optimizer):
                sum((param.float().sin() * (1 + param.float())).sum() for param in params).backward()
        return [optimizer.sigma(param) for param in params] + [param.detach() for param in params]

    for left, right in zip(train(1), train(threads), strict=True):
        assert torch.equal(left, right)


@both
def test_the_noise_of_every_piece_and_draw_is_its_own() -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 30), (64, 30), (30, 30))]
    optimizer = IVONLoRA(params, ess=1.0, h0=1.0, prior=0.0)
    optimizer._get_buffers()[0].limit = 600
    rows = []
    for _ in range(2):
        with optimizer.sampled_params():
            rows += [row.detach().clone() for param in params for row in param]
    correlation = np.corrcoef(torch.stack(rows).numpy()) - np.eye(len(rows))
    assert abs(correlation).max() < 0.99, "no two rows of the same noise"


@both
def test_tensors_without_a_gradient_split_the_chunks_and_keep_their_state() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(5)]
    optimizer = IVONLoRA(params, **SETTINGS)
    before = [optimizer.sigma(param) for param in params]
    with optimizer.sampled_params():
        sum(params[i].square().sum() for i in (0, 1, 3)).backward()
    optimizer.step()
    [buffers] = optimizer._get_buffers()
    layout = buffers.with_gradient()
    assert [[i for i, _ in chunk.parts] for chunk in layout.chunks] == [[0, 1], [3]]
    assert [bool((param != 1).any()) for param in params] == [True, True, False, True, False]
    for i in (2, 4):
        assert torch.equal(optimizer.sigma(params[i]), before[i])
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_in_order_and_without_gradients(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    results = in_parallel(lambda i: (i * i, torch.is_grad_enabled()), range(50))
    assert results == [(i * i, False) for i in range(50)]
    assert in_parallel(lambda i: i, []) == []


def test_an_error_is_raised_when_nothing_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    working, lock = [0], threading.Lock()

    def work(i: int) -> None:
        with lock:
            working[0] += 1
        try:
            if i == 5:
                raise KeyError(i)
        finally:
            with lock:
                working[0] -= 1

    with pytest.raises(KeyError):
        in_parallel(work, range(40))
    assert working == [0]


def trained(steps: int, **changes: object) -> IVONLoRA:
    """Return an optimizer whose tensors are in one part, in several, of another dtype, and in a group of its own."""
    pair = {**lora_pair(), "half": lora_pair(3, torch.bfloat16)["A"], "one": nn.Parameter(torch.ones(()))}
    own, old, adam = (nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (9, 6), (4, 7)))
    yesterday = torch.linspace(-0.1, 0.1, 54).view(9, 6), torch.linspace(1e-3, 0.2, 54).view(9, 6)
    groups = [
        {"params": [*pair.items()]},
        {"params": [("own", own)], "ess": 1e2, "clip": 0.5, "prior": 0.25},
        {"params": [("old", old)], "prior": {"old": yesterday}, "prior_strength": 0.5},
        {"params": [("adam", adam)], **ADAM, "prior": "empirical", "batch_size": 4},
    ]
    optimizer = IVONLoRA(groups, **{**SETTINGS, **changes})
    for buffers in optimizer._get_buffers():
        buffers.limit = 30
    for batch in batches(steps):
        with step_of(optimizer):
            loss = lora_loss(pair, batch) + pair["half"].float().sin().sum() + pair["one"].square()
            (loss + (own.cumsum(1) - 2).square().sum() + (old - 0.3).square().sum() * 1e-2 + wave(adam)).backward()
    return optimizer


def wave(param: Tensor) -> Tensor:
    """Return a loss some of whose gradients change their sign with the draw, and some do not."""
    return (param * torch.linspace(1, 900, param.numel()).view_as(param)).sin().sum()


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
            bound = group["clip"] * state["precision"]
            if group["direction"] == "adam":
                bound = ((state["precision"] - state["unseen"]) * state["per_loss"]).sqrt() / state["seen"]
            clipped += int((direction.abs() >= bound).sum())
    weights = sum(map(len, sigmas))
    return {
        "ivon_sigma_mean": np.concatenate(sigmas).mean(),
        "ivon_snr_mean": np.concatenate(ratios).mean(),
        "ivon_log_sigma_spread": spread / weights,
        "ivon_clipped_share": clipped / weights,
        "ivon_kl": kl,
        "ivon_ess": SETTINGS["ess"],
    }


@both
@pytest.mark.parametrize("clip", [0.4, 2.0])
def test_every_figure_is_the_closed_form(clip: float) -> None:
    optimizer = trained(12, clip=clip)
    expected = in_float64(optimizer)
    assert optimizer.summary() == pytest.approx(expected, rel=1e-4)
    assert 0.05 < expected["ivon_clipped_share"] < 0.95, "all or none would say little"
    assert expected["ivon_log_sigma_spread"] > 1e-3
    assert expected["ivon_kl"] > 1


def test_at_the_start_sigma_is_the_same_within_a_tensor_and_nothing_was_clipped() -> None:
    optimizer = trained(0)
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


def test_small_spreads_are_told_from_none() -> None:
    """p of a tensor spreads by so little that a sum of squares of log p would lose it in float32."""
    param = nn.Parameter(torch.zeros(400, 400))
    optimizer = IVONLoRA([param], **SETTINGS)
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(0)).flatten()
    optimizer._get_buffers()[0].precision.copy_(0.1 * (2e-3 * 2 * noise).exp())
    assert optimizer.summary()["ivon_log_sigma_spread"] == pytest.approx(2e-3, rel=1e-2)


def test_a_prior_that_is_no_distribution_has_no_divergence_and_no_clip_clips_nothing() -> None:
    optimizer = trained(2, prior=0.0, clip=math.inf)
    for group in optimizer.param_groups:
        group |= {"clip": math.inf, "direction": "newton"}
    summary = optimizer.summary()
    assert "ivon_kl" not in summary
    assert summary["ivon_clipped_share"] == 0
    assert IVONLoRA([nn.Parameter(torch.zeros(0, 3))], **SETTINGS).summary()["ivon_sigma_mean"] == 0
