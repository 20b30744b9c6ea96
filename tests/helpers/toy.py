"""A LoRA pair with a loss, small enough to be trained beside the float64 reference."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from reference import ReferenceIVON
from torch import nn

from axolotl_ivon import IVONLoRA
from axolotl_ivon.optim.kernels.base import Chunk

# `benchmarks/gpu.py` names a GPU here. Random numbers are made on a CPU, so that they are the same ones.
DEVICE = torch.device(os.environ.get("IVON_TEST_DEVICE", "cpu"))

# Options of the optimizer and of the reference by the same names.
ADDED = ("rescale_lr", "prior_strength", "hessian", "batch_size", "h0_steps", "direction")
SETTINGS = {"lr": 3e-2, "ess": 2e4, "betas": (0.9, 0.9995), "h0": 5e-2, "clip": 1e-2}

# What `ivon_preset: auto` changes of the algorithm.
SQUARED = {"hessian": "squared_gradients", "batch_size": 8, "prior_strength": 0.1, "h0_steps": 10, "clip": 1e-2}
# h0 as `auto` has it, of the size of the data: E[ĝ²] is what is left of p without it.
ADAM = {**SQUARED, "direction": "adam", "h0": 1e-4}


def lora_pair(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 24, generator=generator) / 5
    return {name: nn.Parameter(x.to(DEVICE, dtype)) for name, x in (("A", a), ("B", torch.zeros(16, 4)))}


def gaussian_prior(seed: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (m₀, σ₀) of a pair, with σ₀ that differs from weight to weight by a factor of ten."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(p.shape, generator=generator) / 5, 0.01 * 10 ** torch.rand(p.shape, generator=generator))
        for name, p in lora_pair().items()
    }


def lora_loss(pair: dict[str, nn.Parameter], batch: torch.Tensor) -> torch.Tensor:
    target = torch.linspace(-1, 1, 16 * 24, device=DEVICE).view(16, 24).sin()
    out = batch @ pair["A"].float().T @ pair["B"].float().T
    return (out - batch @ target.T).square().mean()


def batches(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 24, generator=generator).to(DEVICE) for _ in range(count)]


@contextmanager
def step_of(optimizer: IVONLoRA) -> Iterator[None]:
    """Take a step from the gradients at one draw, which are computed inside."""
    with optimizer.sampled_params():
        yield
    optimizer.step()
    optimizer.zero_grad()


def train(optimizer: IVONLoRA, pair: dict[str, nn.Parameter], data: Sequence[torch.Tensor]) -> None:
    """Take a step for every batch."""
    for batch in data:
        with step_of(optimizer):
            lora_loss(pair, batch).backward()


def trained_pair(
    data: Sequence[torch.Tensor] = (), dtype: torch.dtype = torch.float32, **changes: object
) -> tuple[dict[str, nn.Parameter], IVONLoRA]:
    """Return a pair and its optimizer after a step for every batch."""
    pair = lora_pair(dtype=dtype)
    optimizer = IVONLoRA(pair.items(), **{**SETTINGS, **changes})
    train(optimizer, pair, data)
    return pair, optimizer


def posterior_of(pair: dict[str, nn.Parameter], optimizer: IVONLoRA) -> list[torch.Tensor]:
    """Return m and σ of each tensor."""
    return [values(param) for param in pair.values() for values in (optimizer.mean, optimizer.sigma)]


def relative(value: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(value.double().cpu().numpy() - expected).max() / np.abs(expected).max())


def run_beside_reference(
    pair: dict[str, nn.Parameter], steps: int, micro_batches: int = 1, whole: bool = False, **kwargs: object
) -> tuple[IVONLoRA, dict[str, ReferenceIVON]]:
    """Train `pair` and feed the θ that were really drawn, and the gradients there, to the reference."""
    hyper = {**SETTINGS, **kwargs}
    optimizer = IVONLoRA(pair.items(), **hyper)
    for buffers in optimizer._get_buffers():
        buffers.limit = math.inf if whole else 64
    prior = hyper.get("prior", "empirical")
    references = {
        name: ReferenceIVON(
            param.detach().double().cpu().numpy(),
            hyper["ess"],
            *hyper["betas"],
            hyper["h0"],
            hyper["clip"],
            tuple(x.double().cpu().numpy() for x in prior[name]) if isinstance(prior, dict) else prior,
            **{name: hyper[name] for name in ADDED if name in hyper},
        )
        for name, param in pair.items()
    }
    data = iter(batches(steps * micro_batches))
    for step in range(steps):
        lr = hyper["lr"] * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr
        thetas: dict[str, list[np.ndarray]] = {name: [] for name in pair}
        gradients: dict[str, list[np.ndarray]] = {name: [] for name in pair}
        for _ in range(micro_batches):
            batch = next(data)
            with optimizer.sampled_params():
                loss = lora_loss(pair, batch) / micro_batches
                loss.backward()
                for name, param in pair.items():
                    thetas[name].append(param.detach().double().cpu().numpy().copy())
                    gradients[name].append(param.grad.double().cpu().numpy().copy())
        optimizer.step()
        optimizer.zero_grad()
        for name, reference in references.items():
            reference.step(thetas[name], gradients[name], lr)
    return optimizer, references


def chunk_of(sizes: list[int], dtype: torch.dtype = torch.float32) -> Chunk:
    """Return flat tensors of these sizes as a chunk for kernels, with some state."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator).to(DEVICE, dtype)) for size in sizes]
    mean = torch.cat([param.detach() for param in params]).float()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    streams = np.arange(2 * len(sizes), dtype=np.uint64).reshape(-1, 2)
    flats = (mean, mean.cos() * 0.1, mean.abs() + 0.1)
    return Chunk(params, [(i, None) for i in range(len(sizes))], starts, flats, streams)
