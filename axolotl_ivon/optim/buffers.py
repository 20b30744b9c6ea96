"""The state of the optimizer in flat buffers, and the pieces that are worked on at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise import mixed, random_bits
from .kernels import _arithmetic
from .kernels.base import TRAVEL, Constants
from .threads import in_parallel

# Weights that have noise of their own and are worked on at once on a CPU: few enough to stay in the cache from one
# operation to the next, and enough for the time that Python takes to call an operation not to count.
_PART = 2**17


def _sigma(precision: Tensor, ess: float) -> Tensor:
    return precision.mul(ess).rsqrt_()


def _prior(group: dict[str, Any], mean: Tensor, precision: Tensor) -> float:
    """Return δ of one tensor: the fixed one, or 1/(λ·mean(m² + σ²)), the KL-optimal one."""
    if group["prior"] != "empirical":
        return float(group["prior"])
    # The paper's Eq. 2 is s = λ·δ; δ is what enters the update.
    return mean.numel() / float(group["ess"] * mean.norm() ** 2 + precision.rsqrt().norm() ** 2)


class Piece:
    """Neighbouring weights of a block that are worked on at once: whole tensors, or some rows of large ones.

    `mean`, `momentum` and `precision` are its place in the block's buffers, `means` and `momenta` the same values in
    the shapes that they have in the parameters.
    """

    def __init__(self, block: Block, parts: Sequence[tuple[int, slice | None]]) -> None:
        self.key = block.key
        self.parts = parts  # number of the tensor, and its rows if not all
        self.params = block.params
        self.shapes = [theta.shape for theta in self.thetas]
        self.sizes = [shape.numel() for shape in self.shapes]
        i, rows = parts[0]
        start = block.offsets[i] + (rows.start * block.params[i][0].numel() if rows else 0)
        self.place = slice(start, start + sum(self.sizes))
        self.mean, self.momentum, self.precision = (getattr(block, name)[self.place] for name in block.FLATS)
        self.means, self.momenta = self.shaped(self.mean), self.shaped(self.momentum)
        self.norms = torch.zeros(2, 0)  # of m and of √λ·σ, tensor by tensor

    @cached_property
    def streams(self) -> np.ndarray:
        """What tells the noise of a part from that of others: uint64 [parts, 2]."""
        return np.stack([random_bits(f"{self.key}/{i}/{rows.start if rows else 0}") for i, rows in self.parts])

    @property
    def thetas(self) -> list[Tensor]:
        """What the parameters hold here."""
        return [self.params[i] if rows is None else self.params[i][rows] for i, rows in self.parts]

    @property
    def gradients(self) -> list[Tensor]:
        """Their gradients."""
        gradients: list[tuple[Any, slice | None]] = [(self.params[i].grad, rows) for i, rows in self.parts]
        return [gradient if rows is None else gradient[rows] for gradient, rows in gradients]

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """Part values of the piece by tensor."""
        return (flat,) if len(self.sizes) == 1 else flat.split_with_sizes(self.sizes)

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Part values of the piece by tensor, in the shapes that they have in the parameters."""
        return [part.view(shape) for part, shape in zip(self.split(flat), self.shapes, strict=True)]


class Block:
    """The state of a group's parameters on one device and of one dtype.

    m, g and p are one flat float32 buffer each, in which every tensor has its place; `optimizer.state` holds
    views of them. They are worked on in pieces: on a CPU small ones, in several threads; elsewhere the whole.
    """

    FLATS = ("mean", "momentum", "precision")
    fused = False

    def __init__(
        self, group: dict[str, Any], params: list[Tensor], state: dict[Tensor, Any], key: tuple[int, int]
    ) -> None:
        self.group, self.params, self.key = group, params, key
        self.device = params[0].device
        self.limit = float(_PART) if self.device.type == "cpu" else math.inf
        self.arithmetic = _arithmetic(self.device, sum(param.numel() for param in params))
        self.offsets = [0, *accumulate(param.numel() for param in params)]
        self.mean, self.momentum, self.precision = (
            torch.zeros(self.offsets[-1], device=self.device) for _ in self.FLATS
        )
        self.steps = torch.zeros(len(params))
        self.moments: dict[int, float] = {}  # λ·Σ(m² + σ²) of each tensor that was drawn last
        self.products: Tensor | None = None  # ĝ·(θ−m) = ĥ/(λ·p), summed over the draws since the last step
        self.earlier: list[Tensor | None] | None = None  # .grad of the draws before this one
        self._layout: tuple[float, ...] = ()
        self._pieces: list[Piece] = []

        for i, param in enumerate(params):
            views = {name: self.view(getattr(self, name), i) for name in self.FLATS}
            step = self.steps[i]
            if saved := state.get(param):
                for name, view in views.items():
                    view.copy_(saved[name])
                step.copy_(saved["step"])
            elif param.numel():
                views["mean"].copy_(param)
                views["precision"].fill_(group["h0"])
                views["precision"].add_(_prior(group, views["mean"], views["precision"]))
            state[param] = {**views, "step": step}

    def view(self, flat: Tensor, i: int) -> Tensor:
        return flat[self.offsets[i] : self.offsets[i + 1]].view(self.params[i].shape)

    def pieces(self, chosen: list[int], ages: Sequence[float] | None = None) -> list[Piece]:
        """Return the pieces that make up some tensors; the tensors of one piece are of the same age."""
        if not chosen:
            return []
        ages = ages or [0.0] * len(chosen)
        layout = (self.limit, *chosen, *(age - ages[0] for age in ages))
        if layout != self._layout:
            self._layout, self._pieces = layout, self._lay_out(chosen, ages)
        return self._pieces

    def _lay_out(self, chosen: list[int], ages: Sequence[float]) -> list[Piece]:
        pieces: list[list[tuple[int, slice | None]]] = []
        room, follows = 0.0, None
        for i, age in zip(chosen, ages, strict=True):
            for rows in self.parts(i):
                size = self.params[i][rows].numel() if rows else self.params[i].numel()
                if size <= room and follows in ((i, age), (i - 1, age)):
                    pieces[-1].append((i, rows))
                else:
                    pieces.append([(i, rows)])
                    room = self.limit * self.arithmetic.PARTS
                room, follows = room - size, (i, age)
        return [Piece(self, parts) for parts in pieces]

    def parts(self, i: int) -> list[slice | None]:
        """Return the rows that are the parts of a tensor, or None for all of a small one."""
        param = self.params[i]
        if param.numel() <= self.limit or not param.dim():
            return [None]
        rows = max(1, int(self.limit) * len(param) // param.numel())
        return [slice(first, first + rows) for first in range(0, len(param), rows)]

    def with_gradient(self) -> list[int]:
        return [i for i in self.moments if self.params[i].grad is not None]

    def draw(self, number: int | str) -> None:
        """θ = m + σ·ε, ε ~ N(0, I), and beside it what δ needs, for which σ is at hand."""
        ess, seed = self.group["ess"], self.noise_seed(number)

        def draw(piece: Piece) -> None:
            piece.norms = self.arithmetic.draw(piece, self.noise(piece, seed), ess)

        self.moments = {i: 0.0 for i, param in enumerate(self.params) if param.requires_grad and param.numel()}
        pieces = self.pieces(list(self.moments))
        in_parallel(draw, pieces)
        for piece in pieces:
            for (i, _), m, root in zip(piece.parts, *piece.norms.tolist(), strict=True):
                self.moments[i] += ess * m**2 + root**2

    def noise(self, piece: Piece, seed: np.ndarray) -> Tensor:
        noise = torch.empty(sum(piece.sizes), device=self.device)
        seeds = mixed(seed, piece.streams[:, :1], piece.streams[:, 1:])
        if self.device.type == "cpu":
            # Every tensor, or part of a large one, has noise of its own, however they are put into pieces.
            self.arithmetic.noise(noise, piece.sizes, seeds)
        else:
            noise.normal_(generator=torch.Generator(self.device).manual_seed(int(seeds[0, 0]) >> 1))
        return noise

    def noise_seed(self, number: int | str) -> np.ndarray:
        # A seed for each draw, and from it one for each part, not one long stream: two integers in the state are all
        # that a resumed run needs, on whatever device it goes on, and it does not matter which thread draws what.
        return random_bits(f"{self.group['seed']}/{number}")

    def restore_mean(self) -> None:
        def restore(piece: Piece) -> None:
            torch._foreach_copy_(piece.thetas, piece.means)

        in_parallel(restore, self.pieces(list(self.moments)))

    def set_gradients_aside(self) -> None:
        """Make room for the gradient of a draw, which ĥ needs apart from those of the draws before it."""
        self.earlier = None
        if self.products is not None:
            earlier = [param.grad for param in self.params]
            if all(gradient is None for gradient in earlier):
                self.products = None  # the gradients were dropped, so what was computed with them goes too
                return
            self.earlier = earlier
            for i, gradient in enumerate(earlier):
                self.params[i].grad = None
                if gradient is None:
                    self.view(self.products, i).zero_()

    def collect(self) -> None:
        """Put the mean back and note ĝ·(θ−m), added to that of earlier draws; .grad becomes the sum over the draws.

        It is all of ĥ = ĝ·(θ−m)/σ² = λ·p·ĝ·(θ−m) that must be kept, as p stays what it is until the step. θ is read
        from the parameters, so it is what the forward pass saw, after rounding to their dtype.
        """
        chosen = self.with_gradient()
        products = torch.zeros_like(self.mean) if len(chosen) < len(self.params) else torch.empty_like(self.mean)

        def collect(piece: Piece) -> None:
            self.arithmetic.collect(piece, products[piece.place])

        in_parallel(collect, self.pieces(chosen))
        if len(chosen) < len(self.moments):
            self.restore_mean()
        if self.products is not None:
            self.products += products
        elif chosen:
            self.products = products
        self.put_gradients_back(add=True)

    def forget_draw(self) -> None:
        """Take back what a draw that failed left behind."""
        self.put_gradients_back(add=False)

    def gradient_norm(self) -> float:
        pieces = self.pieces(self.with_gradient())
        norms = in_parallel(lambda piece: self.arithmetic.gradient_norm(piece), pieces)
        return math.hypot(*norms)

    def put_gradients_back(self, *, add: bool) -> None:
        for param, gradient in zip(self.params, self.earlier or [None] * len(self.params), strict=True):
            if not add:
                param.grad = gradient
            elif gradient is not None:
                param.grad = gradient if param.grad is None else gradient.add_(param.grad)
        self.earlier = None

    def update(self, scale: Any) -> None:
        """Apply one step of the algorithm to every tensor that has a gradient."""
        if self.products is None:
            return
        products, fixed = self.products, self.group["prior"] != "empirical"
        lr, ess, clip, (beta1, beta2) = (self.group[name] for name in ("lr", "ess", "clip", "betas"))
        chosen = self.with_gradient()
        self.steps[chosen] += 1
        steps = self.steps.tolist()

        def update(piece: Piece) -> None:
            indices = [i for i, _ in piece.parts]
            constants = Constants(
                debias=1 - beta1 ** steps[indices[0]],
                beta1=beta1,
                beta2=beta2,
                # ĥ/p = λ·ĝ·(θ−m), with ĝ scaled as the gradients were
                product=ess * min(scale, TRAVEL),
                bound=min(clip, TRAVEL / max(lr, 1.0)),
                lr=min(lr, TRAVEL),
                fixed=fixed,
            )
            self.arithmetic.update(piece, products[piece.place], [self.delta(i) for i in indices], constants)

        in_parallel(update, self.pieces(chosen, [steps[i] for i in chosen]))

    def delta(self, i: int) -> float:
        """δ of a tensor, from the m and σ of the last draw, which are those before the step."""
        prior = self.group["prior"]
        return self.params[i].numel() / self.moments[i] if prior == "empirical" else float(prior)
