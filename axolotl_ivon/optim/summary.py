"""What a log tells of a posterior that is being trained, in a handful of launches however many tensors there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import Buffers
from .kernels.base import PRECISION_FLOOR, Chunk
from .threads import in_parallel

# log p plus this is positive, and a norm is the one sum over many tensors that takes one launch.
_SHIFT = 1.0 - math.log(PRECISION_FLOOR)


@torch.no_grad()
def summarize(all_buffers: Sequence[Buffers]) -> dict[str, float]:
    """Return what `IVONLoRA.summary` does, but for λ."""
    count, sigma, snr, spread, clipped, kl = torch.zeros(6).tolist()
    for buffers in all_buffers:
        ess, prior, strength = (buffers.group[name] for name in ("ess", "prior", "prior_strength"))
        layout = buffers.layout([i for i, param in enumerate(buffers.params) if param.numel()])
        if not layout.chunks:
            continue
        debias = (buffers.steps * math.log(max(buffers.group["betas"][0], 1e-30))).expm1_().neg_()
        bounds = buffers.group["clip"] * torch.where(buffers.steps > 0, debias, math.inf)  # no step, nothing clipped
        decay = debias * (0.0 if prior == "empirical" else prior * strength)
        work = zip(layout.chunks, *(x[layout.owners].split(layout.counts) for x in (bounds, decay)), strict=True)
        parts = torch.cat(in_parallel(lambda w: _measure(*w), list(work)), 1).cpu().double()
        tensors = torch.zeros(len(parts), len(buffers.params), dtype=torch.float64)
        tensors.index_add_(1, layout.owners.cpu(), parts)
        n, roots, ratios, clips, logs, log_squares, squares, variances = tensors[:, tensors[0] > 0]
        moments = ess * squares + variances  # λ·Σ(m² + σ²)
        delta = (n / moments if prior == "empirical" else torch.full_like(n, prior)) * strength
        kl += float((delta * moments - n + logs - _SHIFT * n - n * delta.log()).sum()) / 2
        deviation = (log_squares / n - (logs / n).square()).clamp_(min=0).sqrt()
        spread += float((n * deviation).sum()) / 2  # log σ = −½·log(λ·p)
        sigma += float(roots.sum()) * ess**-0.5
        snr += float(ratios.sum()) * ess**0.5
        clipped += float(clips.sum())
        count += float(n.sum())
    found = {"sigma_mean": sigma, "snr_mean": snr, "log_sigma_spread": spread, "clipped_share": clipped}
    means = {f"ivon_{name}": total / max(count, 1) for name, total in found.items()}
    return means | ({"ivon_kl": kl} if kl < math.inf else {})  # a prior of δ = 0 is no distribution


def _measure(chunk: Chunk, bounds: Tensor, decay: Tensor) -> Tensor:
    """Return, by part [8, parts]: n, Σ1/√p, Σ|m|·√p, how many are clipped, Σx and Σx² of x = log p + shift, Σm², Σ1/p.

    `bounds` is ξ·(1−β1^t) and `decay` δ·(1−β1^t) with a fixed prior, else 0, by part.
    """
    m, p = chunk.mean, chunk.precision
    # |(g/(1−β1^t) + δ·m)/p| ≥ ξ, without a division
    clipped = torch.addcmul(chunk.momentum, m, chunk.spread(decay)).abs_().ge_(chunk.spread(bounds) * p)
    roots, logs = p.rsqrt(), p.log().add_(_SHIFT)
    sums = _norms(chunk, 1, roots, m / roots, clipped, logs)
    squares = _norms(chunk, 2, logs, m, roots).square_()
    return torch.cat([torch.tensor([chunk.sizes], device=p.device, dtype=sums.dtype), sums, squares])


def _norms(chunk: Chunk, order: int, *flats: Tensor) -> Tensor:
    """Return a norm of values [place] for every part, [values, parts]."""
    parts = [part for flat in flats for part in chunk.shaped(flat)]
    # A sum of 100,000 numbers in float32 has three digits on a CPU; MPS has no float64.
    dtype = torch.float32 if chunk.mean.device.type == "mps" else torch.float64
    return torch.stack(torch._foreach_norm(parts, order, dtype=dtype)).view(len(flats), -1)
