"""The kernels in torch's operations, for every device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...noise import training_noise
from .base import MAX_STEP, PRECISION_CEILING, PRECISION_FLOOR, Chunk, Constants, StepDecision, Terms, root_mean_square

PARTS, GAPS = 1.0, False  # every operation passes over the weights, which must stay in the cache


def noise(chunk: Chunk, seeds: np.ndarray) -> Tensor:
    """Return ε ~ N(0, I); see `Kernels.noise`."""
    out = torch.empty_like(chunk.mean)
    if out.device.type != "cpu":
        return out.normal_(generator=torch.Generator(out.device).manual_seed(int(seeds[0, 0]) >> 1))
    for part, (start, stride) in zip(out.split_with_sizes(chunk.sizes), seeds, strict=True):
        training_noise(part.numpy(), start, stride)
    return out


def draw(chunk: Chunk, noise: Tensor, ess: float) -> Tensor:
    """Draw θ = m + σ·ε; see `Kernels.draw`."""
    roots = chunk.shaped(chunk.precision.rsqrt())  # √λ·σ
    for theta, m, eps, root in zip(chunk.thetas, chunk.means, chunk.shaped(noise), roots, strict=True):
        torch.addcmul(m, eps, root, value=ess**-0.5, out=theta)
    norms = torch.stack(torch._foreach_norm([*chunk.means, *roots])).view(2, -1)
    return norms[0].square().mul_(ess).add_(norms[1].square())


def collect(chunk: Chunk, h_hat: Tensor, *, add: bool, squared: bool = False) -> Tensor:
    """Collect ĥ/(λ·p) = ĝ·(θ−m), or ĥ/B = ĝ²; see `Kernels.collect`."""
    thetas = chunk.thetas
    for theta, m, gradient, h in zip(thetas, chunk.means, chunk.gradients, chunk.shaped(h_hat), strict=True):
        if squared and add:
            h.addcmul_(gradient.float(), gradient.float())
        elif squared:
            torch.square(gradient.float(), out=h)
        elif add:
            h.addcmul_(theta - m, gradient.float())
        else:
            torch.sub(theta, m, out=h).mul_(gradient)
    torch._foreach_copy_(thetas, chunk.means)
    return squares(chunk)


def squares(chunk: Chunk) -> Tensor:
    """Return Σĝ² by part; see `Kernels.squares`."""
    gradients = chunk.gradients
    # float32 also for a float16 gradient, whose norm overflows early.
    sums = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square_()
    if sums.device.type != "cpu":
        return sums + (sums - sums)  # which of the two it is would cost another pass
    if not sums.isfinite().all():
        sums = torch.stack([s if g.isfinite().all() else s * torch.nan for s, g in zip(sums, gradients, strict=True)])
    return sums


def judge(
    at_draw: Tensor, now: Tensor, numbers: Tensor, report: Sequence[int] | Tensor
) -> tuple[StepDecision, Sequence[int] | Tensor]:
    """Decide whether the step is taken; see `Kernels.judge`. This one waits for the device."""
    before, after = float(at_draw.sum()), float(now.sum())
    total, in_a_row, tensor = map(int, report)
    if math.isfinite(before) and math.isfinite(after):
        return (1.0, min(math.sqrt(after / before), MAX_STEP) if before > 0 else 1.0), (total, 0, tensor)
    # Clipping code makes one gradient that is not finite into many, so what was so at the draw is named first.
    bad = numbers[(now if math.isfinite(before) else at_draw).isnan().cpu()].tolist()
    return (0.0, 1.0), (total + 1, in_a_row + 1, min(bad, default=len(numbers)))


def update(chunk: Chunk, h_hat: Tensor, terms: Terms, decision: StepDecision, c: Constants) -> None:
    """Take the step; see `Kernels.update`."""
    taken, scale = map(float, decision)
    if not taken:
        return
    m, g, p = chunk.mean, chunk.momentum, chunk.precision
    delta, debias, rate, memory, unseen, losses = map(chunk.spread, terms)
    if chunk.prior:
        delta = delta * chunk.prior[1]
    torch._foreach_lerp_(chunk.momenta, [gradient.float() for gradient in chunk.gradients], 1 - c.beta1)
    if c.batch is None:
        d = torch.div(delta, p).sub_(1).add_(h_hat, alpha=c.ess * scale).mul_(memory)
        d.nan_to_num_(nan=0.0, neginf=-MAX_STEP)
        p.addcmul_(p, torch.addcmul(d, d, d, value=0.5))
    else:
        p.lerp_(torch.add(delta, h_hat, alpha=c.batch * scale**2), memory.expand_as(p)).nan_to_num_(
            nan=PRECISION_CEILING
        )
    p.clamp_(PRECISION_FLOOR, PRECISION_CEILING)
    direction, divisor = g / debias, p
    if c.adam:
        divisor = root_mean_square(p, unseen, losses).div_(c.bound)
    if c.fixed:
        direction.addcmul_(m - chunk.prior[0] if chunk.prior else m, delta)
    m.addcmul_(direction.div_(divisor).clamp_(-c.bound, c.bound), rate, value=-1)
    torch._foreach_copy_(chunk.thetas, chunk.means)
