"""The kernels in torch's operations, for every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...noise import training_noise
from .base import PRECISION_CEILING, PRECISION_FLOOR, TRAVEL, Constants

if TYPE_CHECKING:
    from ..buffers import Piece


class Arithmetic:
    """The algorithm on the weights of a piece, in torch's operations."""

    PARTS = 1  # of _PART weights that make a piece

    @staticmethod
    def noise(noise: Tensor, sizes: list[int], seeds: np.ndarray) -> None:
        """Put ε ~ N(0, I) into `noise`, which has parts of these sizes, and seeds: uint64 [parts, 2]."""
        for part, (start, stride) in zip(noise.split_with_sizes(sizes), seeds, strict=True):
            training_noise(part.numpy(), start, stride)

    @staticmethod
    def draw(piece: Piece, noise: Tensor, ess: float) -> Tensor:
        """Put θ = m + σ·ε into the parameters; return the norms of m and of √λ·σ by tensor, for δ: [2, tensors]."""
        root = piece.precision.rsqrt()  # √λ·σ
        roots = piece.shaped(root)
        for theta, m, eps, r in zip(piece.thetas, piece.means, piece.shaped(noise), roots, strict=True):
            torch.addcmul(m, eps, r, value=ess**-0.5, out=theta)
        return torch.stack(torch._foreach_norm([*piece.means, *roots])).view(2, -1)

    @staticmethod
    def collect(piece: Piece, product: Tensor) -> None:
        """Note ĝ·(θ−m) in `product` and put the mean back."""
        thetas = piece.thetas
        for theta, mean, gradient, part in zip(
            thetas, piece.means, piece.gradients, piece.shaped(product), strict=True
        ):
            torch.sub(theta, mean, out=part).mul_(gradient)
        torch._foreach_copy_(thetas, piece.means)

    @staticmethod
    def gradient_norm(piece: Piece) -> float:
        """Return the norm of the gradients."""
        # float32 also for a float16 gradient, whose norm overflows early.
        return float(torch.stack(torch._foreach_norm(piece.gradients, dtype=torch.float32)).norm())

    @staticmethod
    def update(piece: Piece, product: Tensor, deltas: list[float], c: Constants) -> None:
        """Take one step, from ĝ in .grad and ĝ·(θ−m); `deltas` are δ by tensor."""
        m, g, p = piece.mean, piece.momentum, piece.precision
        torch._foreach_lerp_(piece.momenta, [gradient.float() for gradient in piece.gradients], 1 - c.beta1)
        # IVON's p ← β2·p + (1−β2)·(ĥ+δ) + ½(1−β2)²·(p−ĥ−δ)²/p is p·(1 + d + ½d²), positive for every d, where
        # d = (1−β2)·((ĥ+δ)/p − 1).
        d = p.reciprocal()
        minus_one = torch.full((), c.beta2 - 1, device=d.device)  # times 1−β2; no copy that a GPU waits for
        for part, delta in zip(piece.split(d), deltas, strict=True):
            torch.add(minus_one, part, alpha=(1 - c.beta2) * delta, out=part)
        d.add_(product, alpha=(1 - c.beta2) * c.product).nan_to_num_(nan=0.0, neginf=-TRAVEL)
        p.addcmul_(p, torch.addcmul(d, d, d, value=0.5)).clamp_(PRECISION_FLOOR, PRECISION_CEILING)
        # clip(x/(1−β1^t), ±ξ) = clip(x, ±ξ·(1−β1^t))/(1−β1^t)
        direction = torch.add(g, m, alpha=deltas[0] * c.debias).div_(p) if c.fixed else g / p
        m.sub_(direction.clamp_(-c.bound * c.debias, c.bound * c.debias), alpha=min(c.lr / c.debias, TRAVEL))
        torch._foreach_copy_(piece.thetas, piece.means)
