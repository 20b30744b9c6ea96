"""The fused kernels: on a CPU in Triton's interpreter (`test_kernels.py` sets TRITON_INTERPRET), or on a GPU.

`benchmarks/gpu.py` runs them on a GPU, which IVON_TEST_DEVICE names.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from toy import DEVICE, SETTINGS, SQUARED, batches, gaussian_prior, lora_loss, lora_pair, relative, run_beside_reference

from axolotl_ivon import IVONLoRA
from axolotl_ivon.errors import IVONError
from axolotl_ivon.optim import kernels
from axolotl_ivon.optim.kernels import gpu


@pytest.fixture(autouse=True)
def _use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "gpu")


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        kernels._tried("gpu", DEVICE, dtype)  # in programs of the usual size, which takes less time
    monkeypatch.setattr(gpu, "_BLOCK", 32)  # so that a tensor is worked on by several


@pytest.mark.parametrize(
    ("prior", "micro_batches", "dtype", "changes"),
    [
        ("empirical", 1, torch.float32, {}),
        (1e-2, 3, torch.float32, {}),
        ("empirical", 1, torch.bfloat16, {}),
        ("empirical", 1, torch.float32, {"rescale_lr": True, "lr": 0.5}),
        ("empirical", 2, torch.float32, SQUARED),
        (gaussian_prior(), 2, torch.float32, SQUARED),
        (gaussian_prior(), 1, torch.float32, {"prior_strength": 0.3}),
    ],
)
def test_follows_the_reference(prior: Any, micro_batches: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    pair = lora_pair(dtype=dtype)
    opt, references = run_beside_reference(pair, 12, micro_batches, prior=prior, **changes)
    assert all(buffers.kernels is gpu for buffers in opt._get_buffers())
    for name, param in pair.items():
        assert relative(opt.mean(param), references[name].m) < 1e-5
        assert relative(opt.sigma(param), references[name].sigma()) < 1e-5
        # The interpreter, unlike a GPU, cuts a bfloat16 off instead of rounding it.
        rtol = 0.0 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(param.detach().float(), opt.mean(param), rtol=rtol, atol=0)
    assert opt.mean(pair["B"]).abs().max() > 1e-3, "nothing moved, so nothing was compared"
    assert opt.skipped_steps == 0


def test_does_what_the_plain_operations_do_with_scaled_clipped_missing_and_infinite_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In two groups, so with two sets of buffers."""
    results = []
    for name in ("plain", "gpu"):
        monkeypatch.setenv(kernels.VARIABLE, name)
        pair, other = lora_pair(), nn.Parameter(torch.linspace(-1, 1, 70, device=DEVICE).view(7, 10))
        frozen = nn.Parameter(torch.ones(50, device=DEVICE), requires_grad=False)
        groups = [
            {"params": [*pair.items(), ("C", frozen)]},
            {"params": [("other", other)], "prior": 0.25, "lr": 1e-2},
        ]
        opt = IVONLoRA(groups, **SETTINGS)
        assert [buffers.kernels.__name__.rsplit(".")[-1] for buffers in opt._get_buffers()] == [name, name]
        told = []
        for step, batch in enumerate(batches(8)):
            frozen.requires_grad_(step > 3)
            with opt.sampled_params():
                loss = lora_loss(pair, batch) if step != 2 else pair["A"].square().sum()
                (loss + other.sin().mean() + (frozen.square().sum() if step > 3 else 0)).backward()
                if step in (3, 6):
                    (pair["B"] if step == 3 else other).grad[3, 1] = math.nan
            if step == 1:
                for param in pair.values():
                    param.grad *= 0.25
            if step == 5:
                pair["B"].grad[0, 0] = math.inf
            opt.step()
            opt.zero_grad()
            told.append(tuple(opt.skipped))
        assert told[-2:] == [(3, 2, "other"), (3, 0, "other")]
        results.append((told, [value for state in opt.state_dict()["state"].values() for value in state.values()]))
    (told, plain_state), (told_fused, fused_state) = results
    assert told == told_fused
    for left, right in zip(plain_state, fused_state, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_what_is_asked_before_the_kernels_are_used() -> None:
    assert (
        kernels.choose([nn.Parameter(torch.ones(3, device=DEVICE)), nn.Parameter(torch.ones(2, 5, device=DEVICE))])
        is gpu
    )
    assert kernels.choose([nn.Parameter(torch.ones(3, device=DEVICE).bfloat16())]) is gpu
    with pytest.raises(IVONError, match="a parameter is not contiguous"):
        kernels.choose([nn.Parameter(torch.ones(4, 3, device=DEVICE).T)])
    with pytest.raises(IVONError, match="float64"):
        kernels.choose([nn.Parameter(torch.ones(3, device=DEVICE).double())])


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(gpu, "PRECISION_FLOOR", 1.0)
    monkeypatch.setattr(gpu, "_BLOCK", 2048)
    monkeypatch.setattr(kernels, "_tried", kernels._tried.__wrapped__)
    monkeypatch.setattr(kernels, "_warn", kernels._warn.__wrapped__)
    params = [nn.Parameter(torch.ones(3, device=DEVICE))]
    with pytest.raises(IVONError, match=r"IVON_KERNELS=gpu cannot be used .* (cpu|cuda:0): Tensor-likes are not close"):
        kernels.choose(params)
    assert not caplog.records
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.setattr(kernels, "_BY_DEVICE", {DEVICE.type: "gpu"})  # as on a GPU, without being asked
    assert kernels.choose(params) is kernels.plain
    assert (
        f"the gpu kernels are not used for torch.float32 parameters on {params[0].device}, which costs time only"
        in caplog.text
    )
    monkeypatch.setattr(gpu, "PRECISION_FLOOR", kernels.base.PRECISION_FLOOR)
    assert kernels.choose(params) is gpu


def test_a_step_that_the_device_refuses_writes_nothing() -> None:
    """As on a GPU, where the kernels are told by a tensor."""
    pair = lora_pair()
    opt = IVONLoRA(pair.items(), **SETTINGS)
    [buffers] = opt._get_buffers()
    with opt.sampled_params():
        lora_loss(pair, batches(1)[0]).backward()
    before = [value.clone() for value in (buffers.mean, buffers.momentum, buffers.precision, buffers.steps)]
    with torch.no_grad():
        opt._update(buffers, torch.tensor([0.0, 1.0], device=DEVICE))
    after = (buffers.mean, buffers.momentum, buffers.precision, buffers.steps)
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert torch.equal(pair["A"].detach(), opt.mean(pair["A"]))


@pytest.mark.parametrize("at_draw", [[1.0, 4.0], [0.0, 0.0], [math.nan, 4.0], [1.0, math.inf], [1.0, math.nan]])
@pytest.mark.parametrize("now", [[16.0, 64.0], [math.nan, math.nan], [math.inf, 1.0], [3e38, 3e38], [1e-30, 3e38]])
def test_the_device_judges_as_the_plain_kernels_do(at_draw: list[float], now: list[float]) -> None:
    report = (3, 2, 1)
    given = (
        torch.tensor(at_draw, device=DEVICE),
        torch.tensor(now, device=DEVICE),
        torch.tensor([1, 0], device=DEVICE),
        report,
    )
    (taken, scale), told = kernels.plain.judge(*given)
    decision, told_on_device = gpu.judge(*given)
    assert list(map(int, told_on_device)) == list(told)
    assert decision[0] == taken
    if taken:
        assert float(decision[1]) == pytest.approx(scale)


def test_the_number_of_launches_does_not_depend_on_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    for name in ("_draw", "_collect", "_squares", "_sum", "_judge", "_update"):
        kernel = getattr(gpu, name)

        class Counted:
            def __getitem__(self, grid: Any, kernel: Any = kernel) -> Any:
                return launches.append(grid) or kernel[grid]

        monkeypatch.setattr(gpu, name, Counted())
    counts = []
    for tensors in (1, 40):
        params = [nn.Parameter(torch.ones(3, 2, device=DEVICE)) for _ in range(tensors)]
        opt = IVONLoRA(params, **SETTINGS)
        opt._get_buffers()
        launches.clear()
        with opt.sampled_params():
            sum(param.square().sum() for param in params[::2]).backward()  # the others have no gradient
        opt.step()
        counts.append(len(launches))
        assert [bool((param != 1).any()) for param in params] == [number % 2 == 0 for number in range(tensors)]
    # Four pass over the weights, as the normals do; the three sums, the judge and some operations of torch are tiny.
    assert counts == [8, 8]
