"""The figures of the posterior in the log of a run, in a handful of launches for any number of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import Buffers, tempered_ess
from .kernels.base import PRECISION_FLOOR, Chunk, root_mean_square
from .threads import in_parallel

# log p plus this is positive, and a norm is the one sum over many tensors that takes one launch.
_SHIFT = 1.0 - math.log(PRECISION_FLOOR)
_PRIOR_SHIFT = 88.0  # and so is the log of every normal float32 plus this


@torch.no_grad()
def summarize(all_buffers: Sequence[Buffers]) -> dict[str, float]:
    """Return what `IVONLoRA.summary` does, but for λ."""
    count, sigma, snr, spread, clipped, kl = torch.zeros(6).tolist()
    for buffers in all_buffers:
        ess, prior, strength = tempered_ess(buffers.group), buffers.group["prior"], buffers.group["prior_strength"]
        layout = buffers.layout([i for i, param in enumerate(buffers.params) if param.numel()])
        if not layout.chunks:
            continue
        debias = (buffers.steps * math.log(max(buffers.group["betas"][0], 1e-30))).expm1_().neg_()
        adam = buffers.group["direction"] == "adam"
        bounds = torch.where(buffers.steps > 0, debias, math.inf)  # no step, nothing clipped
        bounds *= 1.0 if adam else buffers.group["clip"]
        own = prior == "gaussian"  # δ of a weight is then `given`/σ₀²
        given = 0.0 if prior == "empirical" else strength / ess if own else prior * strength
        decay = debias * given
        by_tensor = (bounds, decay, *((buffers.unseen, buffers.losses) if adam else ()))
        work = zip(layout.chunks, *(x[layout.owners].split(layout.counts) for x in by_tensor), strict=False)
        parts = torch.cat(in_parallel(lambda w: _measure(*w), list(work)), 1).cpu().double()
        tensors = torch.zeros(len(parts), len(buffers.params), dtype=torch.float64)
        tensors.index_add_(1, layout.owners.cpu(), parts)
        n, roots, ratios, clips, logs, log_squares, squares, variances, own_logs = tensors[:, tensors[0] > 0]
        moments = ess * squares + variances  # λ·Σ(m² + σ²), in units of σ₀² where every weight has a prior of its own
        delta = strength * n / moments if prior == "empirical" else torch.full_like(n, given)
        kl += float((delta * moments - n + logs - _SHIFT * n - n * delta.log() - own_logs).sum()) / 2
        kl += own * _PRIOR_SHIFT * float(n.sum()) / 2
        deviation = (log_squares / n - (logs / n).square()).clamp_(min=0).sqrt()
        spread += float((n * deviation).sum()) / 2  # log σ = −½·log(λ·p)
        sigma += float(roots.sum()) * ess**-0.5
        snr += float(ratios.sum()) * ess**0.5
        clipped += float(clips.sum())
        count += float(n.sum())
    totals = {"sigma_mean": sigma, "snr_mean": snr, "log_sigma_spread": spread, "clipped_share": clipped}
    means = {f"ivon_{name}": total / max(count, 1) for name, total in totals.items()}
    return means | ({"ivon_kl": kl} if kl < math.inf else {})  # a prior of δ = 0 is no distribution


def _measure(chunk: Chunk, bounds: Tensor, decay: Tensor, *adam: Tensor) -> Tensor:
    """Return, by part [9, parts]: n, Σ1/√p, Σ|m|·√p, how many are clipped, Σx, Σx² of x = log p + shift, Σm², Σ1/p, 0.

    Where every weight has a prior of its own the last three are Σ(m−m₀)²/σ₀², Σ1/(p·σ₀²) and Σ(log(1/σ₀²) + shift).
    `bounds` is ξ·(1−β1^t) and `decay` δ·(1−β1^t) with a fixed prior (times σ₀²), else 0, by part. With Adam's direction
    ξ is 1 in it, and `adam` has what p is made up of.
    """
    m, p, decays = chunk.mean, chunk.precision, chunk.spread(decay)
    roots, logs = p.rsqrt(), p.log().add_(_SHIFT)
    away, widths, own_logs = m, roots, torch.zeros(1, device=p.device).expand_as(p)
    if chunk.prior:
        own = chunk.prior[1].sqrt()  # 1/σ₀
        away, widths = (m - chunk.prior[0]).mul_(own), roots * own
        decays, own_logs = decays * own, own.log().mul_(2).add_(_PRIOR_SHIFT)
    divisor = root_mean_square(p, *map(chunk.spread, adam)) if adam else p
    # |(g/(1−β1^t) + δ·m)/p| ≥ ξ, without a division
    clipped = torch.addcmul(chunk.momentum, away, decays).abs_().ge_(chunk.spread(bounds) * divisor)
    sums = _norms(chunk, 1, roots, m / roots, clipped, logs, own_logs)
    squares = _norms(chunk, 2, logs, away, widths).square_()
    sizes = torch.tensor([chunk.sizes], device=p.device, dtype=sums.dtype)
    return torch.cat([sizes, sums[:-1], squares, sums[-1:]])


def _norms(chunk: Chunk, order: int, *flats: Tensor) -> Tensor:
    """Return a norm of values [place] for every part, [values, parts]."""
    parts = [part for flat in flats for part in chunk.shaped(flat)]
    # A sum of 100,000 numbers in float32 has three digits on a CPU; MPS has no float64.
    dtype = torch.float32 if chunk.mean.device.type == "mps" else torch.float64
    return torch.stack(torch._foreach_norm(parts, order, dtype=dtype)).view(len(flats), -1)
