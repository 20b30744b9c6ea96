"""The fused kernels in Triton's interpreter, on a CPU: run by test_fused.py, which sets TRITON_INTERPRET."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from toy import SETTINGS, batches, lora_loss, lora_pair, relative, run_beside_reference

from axolotl_ivon import IVONLoRA
from axolotl_ivon.optim import ivon as optimizer
from axolotl_ivon.optim.buffers import Block
from axolotl_ivon.optim.kernels import gpu as fused


@pytest.fixture(autouse=True)
def _use_fused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_block_type", lambda groups: fused.FusedBlock)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_BLOCK", 32)  # so that a tensor is worked on by several


@pytest.mark.parametrize(
    ("prior", "micro_batches", "dtype"),
    [("empirical", 1, torch.float32), (1e-2, 3, torch.float32), ("empirical", 1, torch.bfloat16)],
)
def test_follows_the_reference(prior: Any, micro_batches: int, dtype: torch.dtype) -> None:
    pair = lora_pair(dtype=dtype)
    opt, references = run_beside_reference(pair, 12, micro_batches, prior=prior)
    assert all(type(block) is fused.FusedBlock for block in opt._get_blocks())
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
    results = []
    for plain in (True, False):
        if plain:
            monkeypatch.setattr(optimizer, "_block_type", lambda groups: Block)
        else:
            monkeypatch.setattr(optimizer, "_block_type", lambda groups: fused.FusedBlock)
        pair = lora_pair()
        frozen = nn.Parameter(torch.ones(50), requires_grad=False)
        opt = IVONLoRA([*pair.items(), ("C", frozen)], **SETTINGS)
        told = []
        for step, batch in enumerate(batches(7)):
            frozen.requires_grad_(step > 3)
            with opt.sampled_params():
                loss = lora_loss(pair, batch) if step != 2 else pair["A"].square().sum()
                (loss + (frozen.square().sum() if step > 3 else 0)).backward()
                if step == 3:
                    pair["B"].grad[3, 1] = math.nan
            if step == 1:
                for param in pair.values():
                    param.grad *= 0.25
            if step == 5:
                pair["B"].grad[0, 0] = math.inf
            opt.step()
            opt.zero_grad()
            told.append(tuple(opt.skipped))
        state = opt.state_dict()["state"].values()
        results.append((told, [value for tensors in state for value in tensors.values()]))
    (told, plain_state), (told_fused, fused_state) = results
    assert told == told_fused
    assert told[-1] == (2, 0, "B")
    for left, right in zip(plain_state, fused_state, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_an_exception_brings_the_mean_back() -> None:
    pair = lora_pair()
    opt = IVONLoRA(pair.items(), **SETTINGS)
    before = pair["A"].detach().clone()
    with pytest.raises(KeyError), opt.sampled_params():
        assert not torch.equal(pair["A"], before)
        raise KeyError
    assert torch.equal(pair["A"], before)


def test_what_is_asked_on_a_device_before_the_kernels_are_used() -> None:
    assert fused.usable([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 5))])
    assert not fused.usable([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2).bfloat16())])
    assert not fused.usable([nn.Parameter(torch.ones(4, 3).T)])


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fused, "PRECISION_FLOOR", 1.0)
    fused._right.cache_clear()
    assert not fused.usable([nn.Parameter(torch.ones(3))])
    fused._right.cache_clear()
    assert "the fused kernels are not used on cpu" in caplog.text


def test_the_number_of_launches_does_not_depend_on_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch, judge = fused.FusedBlock.launch, fused.FusedBlock.judge
    monkeypatch.setattr(
        fused.FusedBlock, "launch", lambda self, k, *a, **c: (launches.append(str(k)), launch(self, k, *a, **c))
    )
    monkeypatch.setattr(fused.FusedBlock, "judge", lambda self: (launches.append("judge"), judge(self))[1])
    counts = []
    for tensors in (1, 40):
        params = [nn.Parameter(torch.ones(3, 2)) for _ in range(tensors)]
        opt = IVONLoRA(params, **SETTINGS)
        launches.clear()
        with opt.sampled_params():
            sum(param.square().sum() for param in params).backward()
        opt.step()
        counts.append(len(launches))
    assert counts == [6, 6]  # and one for the normals
