"""What all kernels share: the protocol, the weights that they are given, and the bounds that keep a step finite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Bounds on λ and p, from those of normal float32 numbers, 1.2e-38 to 3.4e38. λ·p = 1/σ² lies between 1e-36 and 1e37, so
# it, σ² and σ are normal, and the sum of 1/p over 2^31 weights, of which δ is made, is finite. p is in proportion to
# 1/λ where no data speak, and the floor is far below that at every λ. The update keeps p positive: the floor is there
# for rounding, the ceiling for gradients whose square overflows.
ESS_FLOOR, ESS_CEILING = 1e-8, 1e18
PRECISION_FLOOR, PRECISION_CEILING = 1e-28, 1e19
# What rounding leaves of p where its parts are subtracted from it: a smaller rest says nothing.
ROUNDING = 2.0**-20
# A step that is longer overflows sooner or later, whatever lr and clip allow.
MAX_STEP = 1e18
# Whether a step is taken (1 or 0), and by what ĝ was scaled since its draws; a device's own is float32 [2].
StepDecision = tuple[float, float] | Tensor


class Constants(NamedTuple):
    """The numbers of a step that are the same for all weights of a group."""

    ess: float  # λ
    beta1: float
    bound: float  # ξ
    fixed: bool  # whether the prior is given, so that it acts on m as well
    batch: float | None = None  # B, where ĥ is B·ĝ²; None where it is ĝ·(θ−m)/σ²
    adam: bool = False  # whether a direction is g/√E[ĝ²], with E[ĝ²] from p, times ξ


class Terms(NamedTuple):
    """The numbers of a step that differ from tensor to tensor: float32, by part."""

    deltas: Tensor  # δ; κ/λ where every weight has a prior of its own
    debias: Tensor  # 1−β1^t
    rates: Tensor  # α, whatever it was scaled by included
    memories: Tensor  # 1−β2
    unseen: Tensor  # what p is made of besides gradients, after this step
    losses: Tensor  # and the weight of E[ĝ²] in it: p = unseen + losses·E[ĝ²]


def root_mean_square(p: Tensor, unseen: Tensor, losses: Tensor) -> Tensor:
    """Return √E[ĝ²] of weights with precision p, and what p is made up of: see `Terms`."""
    return torch.maximum(p - unseen, p * ROUNDING).div_(losses).sqrt_()


class Chunk:
    """Weights that are worked on at once: some tensors, or some rows of large ones, called its parts.

    The parts follow one another in `place` without a gap, unless the kernels' `GAPS` allows some.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        parts: Sequence[tuple[int, slice | None]],
        starts: Sequence[int],
        flats: Sequence[Tensor],
        streams: np.ndarray,
    ) -> None:
        """`parts` are numbers of tensors, each with its rows if not all; `flats` are all of m, g, p (, m₀, 1/σ₀²).

        `streams` holds the seed that makes the noise of a part its own, uint64 [parts, 2].
        """
        self.params, self.parts, self.streams = params, parts, streams
        self.shapes = [theta.shape for theta in self.thetas]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.place = slice(starts[0], starts[-1] + self.sizes[-1])  # in the flat buffers
        self.starts = [start - starts[0] for start in starts]  # in `place`
        # m, g and p there, float32 [place], and m₀ and 1/σ₀² likewise where every weight has a prior of its own.
        self.mean, self.momentum, self.precision, *prior = (flat[self.place] for flat in flats)
        self.prior: tuple[Tensor, Tensor] | None = (prior[0], prior[1]) if prior else None
        self.tables: dict[str, Any] = {}  # what kernels keep about the chunk between calls

    @property
    def thetas(self) -> list[Tensor]:
        """What the parameters hold here, by part, in their own shapes and dtype."""
        return [self.params[i] if rows is None else self.params[i][rows] for i, rows in self.parts]

    @property
    def gradients(self) -> list[Tensor]:
        """Their gradients, by part."""
        gradients: list[tuple[Any, slice | None]] = [(self.params[i].grad, rows) for i, rows in self.parts]
        return [gradient if rows is None else gradient[rows] for gradient, rows in gradients]

    @cached_property
    def means(self) -> list[Tensor]:
        """m by part, in the shapes that the parameters have."""
        return self.shaped(self.mean)

    @cached_property
    def momenta(self) -> list[Tensor]:
        """g likewise."""
        return self.shaped(self.momentum)

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Return views of values [place] by part, in the shapes of the parameters."""
        places = zip(self.starts, self.sizes, self.shapes, strict=True)
        return [flat[start : start + size].view(shape) for start, size, shape in places]

    def spread(self, values: Tensor) -> Tensor:
        """Return values by part for every weight [place], or one for all [1]; between parts there must be no gap."""
        if values.device.type == "cpu" and bool((values == values[0]).all()):
            return values[:1]
        return torch.cat([value.expand(size) for value, size in zip(values, self.sizes, strict=True)])


class Kernels(Protocol):
    """What runs over every weight, as a module of functions; `plain`, `cpu` and `gpu` are such modules.

    Values of a chunk are float32 [place], values by part float32 [parts]; both are on the device of the parameters,
    which have a dtype of their own. A kernel for a GPU does not wait for it.
    """

    PARTS: float  # the size of a chunk, in parts of a large tensor
    GAPS: bool  # whether weights that are left alone may lie between the parts of a chunk

    def noise(self, chunk: Chunk, seeds: np.ndarray) -> Tensor:
        """Return ε ~ N(0, I) for the chunk, which depends on the seeds (uint64 [parts, 2]) alone.

        On a CPU every part has a stream of its own, the same bits from all kernels, however parts are put into chunks.
        """

    def draw(self, chunk: Chunk, noise: Tensor, ess: float) -> Tensor:
        """Put θ = m + σ·ε with σ = 1/√(λ·p) into the parameters, and return λ·Σ(m² + σ²) by part, for δ."""

    def collect(self, chunk: Chunk, h_hat: Tensor, *, add: bool, squared: bool = False) -> Tensor:
        """Put ĥ/(λ·p) = ĝ·(θ−m) into `h_hat` [place] or add it, put m back, and return what `squares` does.

        With `squared` it is ĥ/B = ĝ² in its place. θ is read from the parameters, so it is what the forward pass saw,
        after rounding to their dtype.
        """

    def squares(self, chunk: Chunk) -> Tensor:
        """Return Σĝ² by part: NaN where ĝ is not finite, infinity where it is and the sum overflows."""

    def judge(
        self, at_draw: Tensor, now: Tensor, numbers: Tensor, report: Sequence[int] | Tensor
    ) -> tuple[StepDecision, Sequence[int] | Tensor]:
        """Decide whether the step is taken: the norm of ĝ must be finite, at the draws and now.

        Args:
            at_draw, now: Σĝ² of all tensors, float32 [tensors].
            numbers: the numbers of these tensors, int64 [tensors].
            report: the steps skipped in total and in a row, and the first tensor with a bad ĝ in the latest.

        Returns:
            The decision, and the report after this step, in which a norm that no tensor alone makes infinite counts as
            that of tensor number `tensors`.
        """

    def update(self, chunk: Chunk, h_hat: Tensor, terms: Terms, decision: StepDecision, c: Constants) -> None:
        """Take the step from ĝ in .grad and ĥ, and put the new m into the parameters.

        g ← β1·g + (1−β1)·ĝ
        p ← p·(1 + d + ½d²), which is IVON's update, with d = (1−β2)·((ĥ+δ)/p − 1); it is positive for every d.
            Without ½d², the plain running average, where ĥ is a square and so not negative
        m ← m − α·clip((g/(1−β1^t) [+ δ·m with a fixed prior])/p, ±ξ)
            With `adam` m ← m − α·ξ·clip((g/(1−β1^t))/√E[ĝ²], ±1)

        Where the chunk has a prior of its own for every weight, δ is that of `terms` times 1/σ₀², and acts on m − m₀.

        Args:
            h_hat: what `collect` gave, float32 [place].
            terms: float32 [parts] each.
            decision: what `judge` gave: nothing is written if the step is skipped, and ĥ is scaled as ĝ was.
        """


def to_device(values: Any, device: torch.device) -> Tensor:
    """Return a small table on a device, without waiting for it."""
    table = torch.as_tensor(values)
    # Only a copy from pinned memory waits for nothing.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@torch.no_grad()
def trial(kernels: Kernels, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Run every kernel on some thousand weights and return all that came of it, to hold kernels against each other."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 50), (40, 3), (1,)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    starts = list(accumulate((param.numel() for param in params), initial=0))
    mean = torch.cat([param.flatten() for param in params]).float()
    flats = (mean, mean.cos() * 0.1, mean.abs() + 0.1)
    prior = (mean.sin(), mean.abs() + 0.2)
    streams = np.arange(1, 2 * len(params) + 1, dtype=np.uint64).reshape(-1, 2)
    chunk = Chunk(params, [(i, None) for i in range(len(params))], starts[:-1], flats, streams)
    noise = kernels.noise(chunk, chunk.streams)
    results = [noise, kernels.draw(chunk, noise, 1e3)]
    results += [torch.cat([theta.detach().flatten().float() for theta in chunk.thetas])]
    for param in params:
        param.grad = param.sin() * 0.1
    h_hat = torch.empty_like(mean)
    small = torch.linspace(0.1, 0.9, len(params), device=device)
    kinds = ((0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 1, 0), (1, 0, 0, 1))
    for squared, fixed, own, adam in kinds:
        chunk.prior = prior if own else None
        for add in (False, True):
            squares = kernels.collect(chunk, h_hat, add=add, squared=bool(squared))
            results += [squares, h_hat.clone(), kernels.squares(chunk)]
        batch = 8.0 if squared else None
        constants = Constants(ess=1e3, beta1=0.9, bound=1e-2, fixed=bool(fixed), batch=batch, adam=bool(adam))
        terms = Terms(small, small, small * 0.1, small * 0.01, small * 0.1, small)
        decision, _ = kernels.judge(small, small * 4, torch.arange(len(params), device=device), (0, 0, 0))
        kernels.update(chunk, h_hat, terms, decision, constants)
    return [*results, *flats, *(theta.detach().flatten().float() for theta in chunk.thetas)]


def agree(kernels: Kernels, other: Kernels, device: torch.device) -> None:
    """Raise an AssertionError if two sets of kernels do not do the same in float32."""
    for left, right in zip(trial(kernels, device), trial(other, device), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
