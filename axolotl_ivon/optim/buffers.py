"""The state of the optimizer in flat buffers, and the chunks of it that are worked on at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise import random_bits, splitmix64
from .kernels.base import Chunk, Constants, Kernels, StepDecision, Terms, to_device
from .threads import in_parallel

# Weights that have noise of their own and are worked on at once on a CPU: few enough to stay in the cache from one
# operation to the next, and enough for the time that Python takes to call an operation not to count.
_PART = 2**17
# Layouts that are kept: most often all tensors have a gradient, sometimes some have none.
_MOST_LAYOUTS = 4


def tempered_ess(group: dict[str, Any]) -> float:
    """Return λ·τ of a group: at temperature τ, λ·τ stands wherever λ stands at 1."""
    return float(group["ess"] * group["tau"])


class Layout(NamedTuple):
    """Some tensors in chunks."""

    chunks: list[Chunk]
    counts: list[int]  # of the parts of every chunk
    owners: Tensor  # int64 [parts]: the tensor of every part
    there: Tensor  # float32 [tensors]: 1 for the tensors in it, 0 for others
    complete: bool  # whether all tensors are in it
    whole: bool  # whether its parts are all the tensors, one each


class Buffers:
    """The state of a group's parameters on one device and of one dtype.

    m, g and p are one flat float32 buffer each, in which every tensor has its place; `optimizer.state` holds views of
    them. They are worked on in chunks: on a CPU small ones, in several threads; elsewhere as few as the kernels can.
    Values by tensor are float32 [tensors] on the same device.
    """

    FLATS = ("mean", "momentum", "precision")
    PRIOR = ("prior_mean", "prior_precision")

    def __init__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        kernels: Kernels,
        key: tuple[int, int],
        state: dict[Tensor, Any],
        start: Callable[[dict[str, Any], Tensor, Tensor | None], Tensor],
    ) -> None:
        """Take over the existing state; without one m is the parameter and p is `start(group, m, 1/σ₀²)`."""
        self.group, self.params, self.kernels, self.key = group, params, kernels, key
        self.device = params[0].device
        self.limit = float(_PART) if self.device.type == "cpu" else math.inf
        self.offsets = [0, *accumulate(param.numel() for param in params)]
        # m, g and p, and m₀ and 1/σ₀² where every weight has a prior of its own, by their names in the state.
        self.flats = {name: torch.zeros(self.offsets[-1], device=self.device) for name in self.names(group)}
        self.mean, self.momentum, self.precision = (self.flats[name] for name in self.FLATS)
        # By tensor: t, λ·Σ(m² + σ²) of the last draw, and how p = unseen + seen·E[B·ĝ²] is made up, with seen·E[1/B],
        # which is 0 where it is not known; and how many steps p had learned before these, in an earlier run.
        self.steps, self.moments, *adam, self.steps_before = torch.zeros(6, len(params), device=self.device)
        self.unseen, self.seen, self.per_loss = adam
        self.numels = to_device([float(param.numel()) for param in params], self.device)
        self.drawn: list[int] = []  # the numbers of the tensors that were drawn last
        # ĥ in units of λ·p, which stays what it is until the step: Σ ĝ·(θ−m) over the draws since the last one,
        # float32 [weights]. With squared gradients it is Σ ĝ², which is ĥ in units of B.
        self.h_hat: Tensor | None = None
        self.earlier: list[Tensor | None] | None = None  # .grad of the draws before this one, during it
        self._layouts: dict[tuple[float, ...], Layout] = {}

        for i, param in enumerate(params):
            views = {name: self.view(flat, i) for name, flat in self.flats.items()}
            saved = state.get(param) or {}
            views |= {"step": self.steps[i]}
            if group["h0_steps"] is not None:
                views |= {"steps_before": self.steps_before[i]}
            if group["direction"] == "adam":
                views |= {"unseen": self.unseen[i], "seen": self.seen[i], "per_loss": self.per_loss[i]}
            for name, view in views.items():
                if name in saved:
                    view.copy_(saved[name])
            if "step" not in saved and param.numel():
                # A parameter that is m₀, rounded to its dtype, starts at all digits of m₀.
                views["mean"].copy_(views.get("prior_mean", param))
                self._adopt(i)
                views["precision"].copy_(start(group, views["mean"], views.get("prior_precision")))
                self.unseen[i] = views["precision"].flatten()[0]  # one value, but with priors of their own
            state[param] = views

    @property
    def losses(self) -> Tensor:
        """The weight of E[ĝ²] in p by tensor, for p = unseen + losses·E[ĝ²]; with B alike in all steps, seen·B.

        B·ĝ² has the Fisher information of one example as its mean whatever B is. So E[ĝ²] is E[B·ĝ²]·E[1/B].
        """
        return self.seen.square() / self.per_loss.clamp(min=torch.finfo(torch.float32).tiny)

    @classmethod
    def names(cls, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of what a group keeps of every weight."""
        return cls.FLATS + (cls.PRIOR if group["prior"] == "gaussian" else ())

    def view(self, flat: Tensor, i: int) -> Tensor:
        """Return the values of one tensor, in its shape."""
        return flat[self.offsets[i] : self.offsets[i + 1]].view(self.params[i].shape)

    def layout(self, chosen: list[int]) -> Layout:
        """Return the chunks that make up some tensors."""
        key = (self.limit, *chosen)
        if key not in self._layouts:
            if len(self._layouts) == _MOST_LAYOUTS:
                self._layouts.clear()
            chunks = self._lay_out(chosen)
            owners = [i for chunk in chunks for i, _ in chunk.parts]
            there = torch.zeros(len(self.params)).index_fill_(0, torch.tensor(chosen).long(), 1)
            self._layouts[key] = Layout(
                chunks,
                counts=[len(chunk.parts) for chunk in chunks],
                owners=to_device(torch.tensor(owners, dtype=torch.int64), self.device),
                there=to_device(there, self.device),
                complete=len(chosen) == len(self.params),
                whole=owners == list(range(len(self.params))),
            )
        return self._layouts[key]

    def with_gradient(self) -> Layout:
        """Return the chunks of the drawn tensors that have a gradient."""
        return self.layout([i for i in self.drawn if self.params[i].grad is not None])

    def _lay_out(self, chosen: list[int]) -> list[Chunk]:
        chunks: list[list[tuple[int, slice | None]]] = []
        room, before = 0.0, -1
        for i in chosen:
            for rows in self._parts(i):
                size = self.params[i][rows].numel() if rows else self.params[i].numel()
                if chunks and size <= room and (self.kernels.GAPS or i - before <= 1):
                    chunks[-1].append((i, rows))
                else:
                    chunks.append([(i, rows)])
                    room = self.limit * self.kernels.PARTS
                room, before = room - size, i
        return [self._chunk(parts) for parts in chunks]

    def _parts(self, i: int) -> list[slice | None]:
        """Return the rows that are the parts of a tensor, or None for all of a small one."""
        param = self.params[i]
        if param.numel() <= self.limit or not param.dim():
            return [None]
        rows = max(1, int(self.limit) * len(param) // param.numel())
        return [slice(first, first + rows) for first in range(0, len(param), rows)]

    def _chunk(self, parts: list[tuple[int, slice | None]]) -> Chunk:
        firsts = [(i, rows.start if rows else 0) for i, rows in parts]
        starts = [self.offsets[i] + (row * self.params[i][0].numel() if row else 0) for i, row in firsts]
        # Every tensor, or part of a large one, has noise of its own, however they are put into chunks.
        streams = np.stack([random_bits(f"{self.key}/{i}/{row}") for i, row in firsts])
        return Chunk(self.params, parts, starts, [*self.flats.values()], streams)

    def _by_tensor(self, layout: Layout, parts: Sequence[Tensor]) -> Tensor:
        """Return the sums of the parts' values (given by chunk) for every tensor: 0 for one without parts."""
        if layout.whole:
            return parts[0] if len(parts) == 1 else torch.cat([*parts])
        sums = torch.zeros(len(self.params), device=self.device)
        return sums.index_add_(0, layout.owners, torch.cat([*parts])) if parts else sums

    def draw(self, number: int | str, ess: float) -> None:
        """Put θ = m + ε/√(λ·p), ε ~ N(0, I), into the parameters, λ being `ess`, and keep the moments that δ needs.

        Each part has a seed of its own, made from the group's seed and the draw's `number`. So a resumed run needs
        these two alone, and any thread may draw any part.
        """
        bits = random_bits(f"{self.group['seed']}/{number}")

        def draw(chunk: Chunk) -> Tensor:
            noise = self.kernels.noise(chunk, splitmix64(bits, chunk.streams[:, :1], chunk.streams[:, 1:]))
            return self.kernels.draw(chunk, noise, ess)

        self.drawn = [i for i, param in enumerate(self.params) if param.requires_grad and param.numel()]
        layout = self.layout(self.drawn)
        self.moments = self._by_tensor(layout, in_parallel(draw, layout.chunks))

    def adopt_parameters(self) -> None:
        """Let m be what the parameters hold."""
        for i in range(len(self.params)):
            self._adopt(i)

    def _adopt(self, i: int) -> None:
        """Let m of a tensor be its parameter, except for weights whose m, rounded to the parameter's dtype, that is."""
        mean, param = self.view(self.mean, i), self.params[i].detach()
        mean.copy_(torch.where(mean.to(param.dtype) == param, mean, param.float()))

    def restore_mean(self) -> None:
        """Put m back into the parameters."""
        in_parallel(lambda chunk: torch._foreach_copy_(chunk.thetas, chunk.means), self.layout(self.drawn).chunks)

    def set_gradients_aside(self) -> None:
        """Set the gradients of earlier draws aside, since ĥ needs that of a draw alone."""
        self.earlier = None
        if self.h_hat is not None:
            earlier = [param.grad for param in self.params]
            if all(gradient is None for gradient in earlier):
                self.h_hat = None  # the gradients were dropped, so what was computed with them goes too
                return
            self.earlier = earlier
            for i, gradient in enumerate(earlier):
                self.params[i].grad = None
                if gradient is None:
                    self.view(self.h_hat, i).zero_()

    def put_gradients_back(self, *, add: bool) -> None:
        """Add the gradients that were set aside to that of this draw, or (`add` False) put them in its place."""
        for param, gradient in zip(self.params, self.earlier or [None] * len(self.params), strict=True):
            if not add:
                param.grad = gradient
            elif gradient is not None:
                param.grad = gradient if param.grad is None else gradient.add_(param.grad)
        self.earlier = None

    def collect(self) -> Tensor:
        """Take ĥ of the draw, put the mean back, and add both ĝ and ĥ to those of the draws before it.

        Returns:
            Σĝ² by tensor, as `squares` does.
        """
        layout = self.with_gradient()
        h_hat, add = self.h_hat, self.h_hat is not None
        if h_hat is None:
            h_hat = torch.empty_like(self.mean) if layout.complete else torch.zeros_like(self.mean)
        squared = self.group["hessian"] == "squared_gradients"

        def collect(chunk: Chunk) -> Tensor:
            return self.kernels.collect(chunk, h_hat[chunk.place], add=add, squared=squared)

        squares = in_parallel(collect, layout.chunks)
        if layout is not self.layout(self.drawn):
            self.restore_mean()
        if layout.chunks:
            self.h_hat = h_hat
        if self.earlier is None:
            return self._by_tensor(layout, squares)
        self.put_gradients_back(add=True)
        return self.squares()

    def squares(self) -> Tensor:
        """Return Σĝ² by tensor: NaN where ĝ is not finite."""
        layout = self.with_gradient()
        return self._by_tensor(layout, in_parallel(self.kernels.squares, layout.chunks))

    def update(self, terms: Terms, decision: StepDecision, constants: Constants) -> None:
        """Apply one step to every tensor that has a gradient; `terms` are by tensor."""
        layout = self.with_gradient()
        if self.h_hat is None or not layout.chunks:
            return
        h_hat = self.h_hat
        by_part = [values if layout.whole else values[layout.owners] for values in terms]
        work = list(zip(layout.chunks, map(Terms, *(values.split(layout.counts) for values in by_part)), strict=True))
        in_parallel(lambda w: self.kernels.update(w[0], h_hat[w[0].place], w[1], decision, constants), work)
