"""The flat state and its chunks: no layout and no thread changes what comes out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from reference import ReferenceIVON
from torch import nn
from toy import SETTINGS, relative

from axolotl_ivon import IVONLoRA
from axolotl_ivon.optim import kernels


@pytest.fixture(autouse=True, scope="module", params=["plain", "cpu"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for torch's operations and for the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, request.param)
        [buffers] = IVONLoRA([nn.Parameter(torch.ones(1))], ess=1.0)._get_buffers()
        assert buffers.kernels.__name__.endswith(f".{request.param}")
        yield


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
            with optimizer.sampled_params():
                sum((param.float().sin() * (1 + param.float())).sum() for param in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [optimizer.sigma(param) for param in params] + [param.detach() for param in params]

    for left, right in zip(train(1), train(threads), strict=True):
        assert torch.equal(left, right)


def test_a_large_tensor_follows_the_reference_in_pieces_of_several_rows() -> None:
    param = nn.Parameter(torch.randn(50, 30, generator=torch.Generator().manual_seed(0)))
    optimizer = IVONLoRA([param], **SETTINGS)
    optimizer._get_buffers()[0].limit = 100
    reference = ReferenceIVON(
        param.detach().double().numpy(), SETTINGS["ess"], *SETTINGS["betas"], SETTINGS["h0"], SETTINGS["clip"]
    )
    for _ in range(20):
        with optimizer.sampled_params():
            (param.sin() * (1 + param)).mean().backward()
            theta, gradient = param.detach().double().numpy().copy(), param.grad.double().numpy().copy()
        optimizer.step()
        optimizer.zero_grad()
        reference.step([theta], [gradient], SETTINGS["lr"])
    [layout] = optimizer._get_buffers()[0]._layouts.values()
    assert sum(layout.counts) == len(layout.owners) == 17
    assert len(layout.chunks) > 4
    assert relative(param.detach(), reference.m) < 1e-5
    assert relative(optimizer.sigma(param), reference.sigma()) < 1e-5


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
