"""The draw and the update as Triton kernels: seven launches for a sample and a step, however many tensors there are.

On a GPU a launch costs more than the arithmetic. Parameters and gradients are wherever torch put them, so the kernels
get tables of their addresses; m, g and p lie in the flat buffers of the `Block`. Nothing waits for the device: whether
the gradient is finite is judged there, and a step that is skipped writes nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import Block, Piece
from .base import PRECISION_CEILING, PRECISION_FLOOR, TRAVEL

LOG = logging.getLogger(__name__)

# Weights of one program. A program works on one tensor, so that it has one δ and one step count.
_BLOCK = 2048
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(programs, tensors, BLOCK: tl.constexpr):
    """Return the tensor of this program, its size, the places in it, and where they are in the flat buffers."""
    tensor = tl.load(programs + 2 * tl.program_id(0))
    places = tl.load(programs + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    return tensor, tl.load(tensors + 4 * tensor), places, tl.load(tensors + 4 * tensor + 1) + places


@triton.jit
def _draw(
    programs,
    tensors,
    thetas,
    noise,
    mean,
    precision,
    moments,
    ess,
    inverse_root_ess,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """θ = m + σ·ε, and λ·Σ(m² + σ²)."""
    tensor, size, places, flat = _place(programs, tensors, BLOCK)
    inside = places < size
    m = tl.load(mean + flat, mask=inside, other=0.0)
    root = 1 / tl.sqrt(tl.load(precision + flat, mask=inside, other=1.0))
    theta = m + tl.load(noise + flat, mask=inside, other=0.0) * root * inverse_root_ess
    address = tl.load(thetas + tensor)
    tl.store(address.to(tl.pointer_type(TYPE)) + places, theta.to(TYPE), mask=places < tl.where(address != 0, size, 0))
    tl.store(moments + tl.program_id(0), tl.sum(tl.where(inside, ess * m * m + root * root, 0.0)))


@triton.jit
def _restore(programs, tensors, thetas, mean, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Put the mean back."""
    tensor, size, places, flat = _place(programs, tensors, BLOCK)
    address = tl.load(thetas + tensor)
    inside = places < tl.where(address != 0, size, 0)
    m = tl.load(mean + flat, mask=inside, other=0.0)
    tl.store(address.to(tl.pointer_type(TYPE)) + places, m.to(TYPE), mask=inside)


@triton.jit
def _collect(
    programs, tensors, thetas, gradients, mean, products, FIRST: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Note ĝ·(θ−m) and put the mean back."""
    tensor, size, places, flat = _place(programs, tensors, BLOCK)
    inside = places < size
    address, source = tl.load(thetas + tensor), tl.load(gradients + tensor)
    pointer = address.to(tl.pointer_type(TYPE)) + places
    m = tl.load(mean + flat, mask=inside, other=0.0)
    theta = tl.load(pointer, mask=places < tl.where(address != 0, size, 0), other=0.0).to(tl.float32)
    gradient = tl.load(
        source.to(tl.pointer_type(TYPE)) + places, mask=places < tl.where(source != 0, size, 0), other=0.0
    )
    product = tl.where(source != 0, (theta - m) * gradient.to(tl.float32), 0.0)
    if not FIRST:
        product += tl.load(products + flat, mask=inside, other=0.0)
    tl.store(products + flat, product, mask=inside)
    tl.store(pointer, m.to(TYPE), mask=places < tl.where(address != 0, size, 0))


@triton.jit
def _square(programs, tensors, gradients, squares, STICKY: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Σ ĝ² of every program; if sticky, what was not finite before stays so."""
    tensor, size, places, _ = _place(programs, tensors, BLOCK)
    source = tl.load(gradients + tensor)
    gradient = tl.load(
        source.to(tl.pointer_type(TYPE)) + places, mask=places < tl.where(source != 0, size, 0), other=0.0
    ).to(tl.float32)
    square = tl.sum(gradient * gradient)
    if STICKY:
        before = tl.load(squares + tl.program_id(0))
        square += before - before
    tl.store(squares + tl.program_id(0), square)


@triton.jit
def _judge(
    programs,
    squares_at_draw,
    squares,
    gradients,
    steps,
    verdict,
    report,
    programs_count,
    tensors_count,
    BLOCK: tl.constexpr,
):
    """Decide whether the step is taken, and by what the gradients were scaled since the draw; one program."""
    at_draw, now = 0.0, 0.0
    first_at_draw = tl.full((), 0, tl.int64) + tensors_count
    first = first_at_draw
    for start in range(0, programs_count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < programs_count
        square = tl.load(squares + places, mask=inside, other=0.0)
        owner = tl.load(programs + 2 * places, mask=inside, other=0)
        earlier = tl.load(squares_at_draw + places, mask=inside, other=0.0)
        at_draw += tl.sum(earlier)
        now += tl.sum(square)
        first_at_draw = tl.minimum(first_at_draw, tl.min(tl.where(earlier - earlier == 0, tensors_count, owner)))
        first = tl.minimum(first, tl.min(tl.where(square - square == 0, tensors_count, owner)))
    # Clipping code makes one gradient that is not finite into many, so what was so at the draw is named first.
    first = tl.where(first_at_draw < tensors_count, first_at_draw, first)
    both = at_draw + now
    taken = tl.where(both - both == 0, 1, 0)  # as infinity − infinity is not a number
    tl.store(verdict, taken.to(tl.float32))
    tl.store(verdict + 1, tl.where(at_draw > 0, tl.sqrt(now / at_draw), 1.0))
    total, in_a_row, before = tl.load(report), tl.load(report + 1), tl.load(report + 2)
    tl.store(report, total + 1 - taken)
    tl.store(report + 1, (in_a_row + 1) * (1 - taken))
    tl.store(report + 2, before * taken + first * (1 - taken))
    for start in range(0, tensors_count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < tensors_count
        has_gradient = tl.load(gradients + places, mask=inside, other=0) != 0
        step = tl.load(steps + places, mask=inside, other=0.0)
        tl.store(steps + places, step + tl.where(has_gradient, taken, 0), mask=inside)


@triton.jit
def _update(
    programs,
    tensors,
    thetas,
    gradients,
    mean,
    momentum,
    precision,
    products,
    moments,
    steps,
    verdict,
    lr,
    log2_beta1,
    one_minus_beta1,
    one_minus_beta2,
    ess,
    clip,
    fixed_delta,
    travel,
    floor,
    ceiling,
    FIXED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the algorithm, as in `Block.update`."""
    tensor, size, places, flat = _place(programs, tensors, BLOCK)
    source, address = tl.load(gradients + tensor), tl.load(thetas + tensor)
    taken = places < tl.where(source != 0, size, 0) * tl.load(verdict).to(tl.int64)
    scale = tl.load(verdict + 1)
    m = tl.load(mean + flat, mask=taken, other=0.0)
    g = tl.load(momentum + flat, mask=taken, other=0.0)
    p = tl.load(precision + flat, mask=taken, other=1.0)
    product = tl.load(products + flat, mask=taken, other=0.0)
    gradient = tl.load(source.to(tl.pointer_type(TYPE)) + places, mask=taken, other=0.0).to(tl.float32)

    delta = fixed_delta
    if not FIXED:
        moment = 0.0
        first, count = tl.load(tensors + 4 * tensor + 2), tl.load(tensors + 4 * tensor + 3)
        for start in range(0, count, BLOCK):
            others = start + tl.arange(0, BLOCK)
            moment += tl.sum(tl.load(moments + first + others, mask=others < count, other=0.0))
        delta = tl.load(tensors + 4 * tensor).to(tl.float32) / moment
    debias = tl.maximum(1 - tl.exp2(tl.load(steps + tensor) * log2_beta1), one_minus_beta1)

    g += one_minus_beta1 * (gradient - g)
    d = one_minus_beta2 * (delta / p - 1) + one_minus_beta2 * ess * scale * product
    d = tl.maximum(tl.where(d == d, d, 0.0), -travel)
    p = tl.minimum(tl.maximum(p + p * (d + 0.5 * d * d), floor), ceiling)
    direction = g / debias
    if FIXED:
        direction += delta * m
    m -= lr * tl.minimum(tl.maximum(direction / p, -clip), clip)

    tl.store(momentum + flat, g, mask=taken)
    tl.store(precision + flat, p, mask=taken)
    tl.store(mean + flat, m, mask=taken)
    tl.store(address.to(tl.pointer_type(TYPE)) + places, m.to(TYPE), mask=taken)


class FusedBlock(Block):
    """The state of all parameters, worked on by the kernels above."""

    fused = True

    def __init__(
        self, group: dict[str, Any], params: list[Tensor], state: dict[Tensor, Any], key: tuple[int, int]
    ) -> None:
        super().__init__(group, params, state, key)
        self.steps = self.steps.to(self.device)
        for param, step in zip(params, self.steps, strict=True):
            state[param]["step"] = step
        programs: list[tuple[int, int]] = []
        tensors = []
        for i, param in enumerate(params):
            starts = range(0, param.numel(), _BLOCK)
            tensors.append((param.numel(), self.offsets[i], len(programs), len(starts)))
            programs += [(i, start) for start in starts]
        self.programs = torch.tensor(programs or [(0, 0)], device=self.device)
        self.tensors = torch.tensor(tensors, device=self.device)
        self.partial = torch.zeros(3, len(self.programs), device=self.device)  # moments; Σ ĝ² at the draw, and now
        self.verdict = torch.zeros(2, device=self.device)
        self.report = torch.tensor([0, 0, -1], device=self.device)
        self.tables: dict[str, tuple[list[int], Tensor]] = {}
        self.everything = Piece(self, [(i, None) for i in range(len(params))])
        self.constants = {"TYPE": _TYPES[params[0].dtype], "BLOCK": _BLOCK}

    @property
    def skipped(self) -> tuple[int, int, int]:
        """The number of skipped steps, of those in a row, and the tensor (−1: none yet); waits for the device."""
        total, in_a_row, tensor = self.report.tolist()
        return total, in_a_row, tensor

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        with torch.cuda.device_of(self.mean):
            kernel[(len(self.programs),)](self.programs, self.tensors, *arguments, **self.constants, **constants)

    def addresses(self, name: str, tensors: Sequence[Tensor | None]) -> Tensor:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if self.tables.get(name, ([], None))[0] != addresses:
            table = torch.tensor(addresses)
            if self.device.type == "cuda":  # from pinned memory the copy waits for nothing
                table = table.pin_memory().to(self.device, non_blocking=True)
            self.tables[name] = (addresses, table)
        return self.tables[name][1]

    def thetas(self) -> Tensor:
        return self.addresses("thetas", [param if i in self.moments else None for i, param in enumerate(self.params)])

    def gradients(self) -> Tensor:
        chosen = set(self.with_gradient())
        for i in chosen:
            gradient = self.params[i].grad
            if gradient is not None and not gradient.is_contiguous():
                self.params[i].grad = gradient.contiguous()
        return self.addresses("gradients", [param.grad if i in chosen else None for i, param in enumerate(self.params)])

    @torch.no_grad()
    def draw(self, number: int | str) -> None:
        """θ = m + σ·ε, ε ~ N(0, I), and beside it what δ needs."""
        self.moments = {i: 0.0 for i, param in enumerate(self.params) if param.requires_grad and param.numel()}
        noise = self.noise(self.everything, self.noise_seed(number))
        ess = float(self.group["ess"])
        self.launch(_draw, self.thetas(), noise, self.mean, self.precision, self.partial[0], ess, ess**-0.5)

    def restore_mean(self) -> None:
        """Put the mean back."""
        self.launch(_restore, self.thetas(), self.mean)

    @torch.no_grad()
    def collect(self) -> None:
        """Put the mean back and note ĝ·(θ−m), added to that of earlier draws; .grad becomes the sum over the draws."""
        first = self.products is None
        products = torch.empty_like(self.mean) if self.products is None else self.products
        self.launch(_collect, self.thetas(), self.gradients(), self.mean, products, FIRST=first)
        if self.with_gradient():
            self.products = products
        self.put_gradients_back(add=True)
        self.launch(_square, self.gradients(), self.partial[1], STICKY=not first)

    def measure(self) -> None:
        """Take the norm of the gradients for that at the draw, after something that is no scaling changed them."""
        self.launch(_square, self.gradients(), self.partial[1], STICKY=False)

    def judge(self) -> Tensor:
        """Decide on the device whether the step is taken; return what `update` needs to know about it."""
        gradients = self.gradients()
        self.launch(_square, gradients, self.partial[2], STICKY=False)
        counts = (len(self.programs), len(self.params))
        with torch.cuda.device_of(self.mean):
            _judge[(1,)](
                self.programs,
                *self.partial[1:],
                gradients,
                self.steps,
                self.verdict,
                self.report,
                *counts,
                BLOCK=_BLOCK,
            )
        return self.verdict

    def update(self, scale: Tensor) -> None:
        """Apply one step of the algorithm to every tensor that has a gradient, unless it is skipped."""
        if self.products is None:
            return
        group = self.group
        lr, ess, clip = (float(group[name]) for name in ("lr", "ess", "clip"))
        beta1, beta2 = group["betas"]
        fixed = group["prior"] != "empirical"
        self.launch(
            _update,
            self.thetas(),
            self.gradients(),
            self.mean,
            self.momentum,
            self.precision,
            self.products,
            self.partial[0],
            self.steps,
            scale,
            min(lr, TRAVEL),
            math.log2(max(beta1, 1e-30)),
            1 - beta1,
            1 - beta2,
            ess,
            min(clip, TRAVEL / max(lr, 1.0)),
            float(group["prior"]) if fixed else 0.0,
            TRAVEL,
            PRECISION_FLOOR,
            PRECISION_CEILING,
            FIXED=fixed,
        )


def usable(params: Sequence[Tensor]) -> bool:
    """Return whether the kernels can work on these parameters, and are right on their device."""
    first = params[0]
    alike = all(p.device == first.device and p.dtype == first.dtype and p.is_contiguous() for p in params)
    return alike and first.dtype in _TYPES and _right(first.device)


@functools.cache
@torch.no_grad()
def _right(device: torch.device) -> bool:
    """Hold the kernels against the plain operations once, on some thousand weights; say so if they cannot be used."""
    group = {"lr": 1e-2, "ess": 1e3, "betas": (0.9, 0.99), "h0": 0.1, "clip": 1e-2, "prior": "empirical", "seed": 0}
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((70, 50), (40, 3), (1,))]
    results = []
    try:
        for make in (Block, FusedBlock):
            params = [value.to(device, copy=True) for value in values]
            for param in params:
                param.requires_grad_()
            block: Any = make(group, params, {}, (0, 0))
            block.draw(1)
            for param, value in zip(params, values, strict=True):
                param.grad = value.to(device).sin() * 0.1
            block.collect()
            block.update(block.judge() if block.fused else 1.0)
            results.append(torch.cat([block.mean, block.momentum, block.precision]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    except Exception as error:  # a compiler, driver or architecture that Triton does not get along with
        LOG.warning(
            "the fused kernels are not used on %s, which costs time only: %s", device, str(error).split("\n")[0]
        )
        return False
    return True
