"""The kernels in Triton: as many launches for a sample and a step, however many tensors there are.

On a GPU a launch costs more than the arithmetic. Parameters and gradients are wherever torch put them, so the kernels
get tables of their addresses; m, g, p and ĥ lie in flat buffers. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .base import (
    MAX_STEP,
    PRECISION_CEILING,
    PRECISION_FLOOR,
    ROUNDING,
    Chunk,
    Constants,
    StepDecision,
    Terms,
    to_device,
)

PARTS, GAPS = math.inf, True

# Weights of one program. A program works on one part, so that it has one δ and one step count.
_BLOCK = 2048
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(programs, parts, BLOCK: tl.constexpr):
    """Return the part of this program, the places in it, where those are in the flat buffers, and which are there."""
    part = tl.load(programs + 2 * tl.program_id(0))
    places = tl.load(programs + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    return part, places, tl.load(parts + 4 * part + 1) + places, places < tl.load(parts + 4 * part)


@triton.jit
def _at(addresses, part, places, TYPE: tl.constexpr):
    """Return pointers to places of a tensor."""
    return tl.load(addresses + part).to(tl.pointer_type(TYPE)) + places


@triton.jit
def _draw(
    programs, parts, thetas, noise, mean, precision, ess, scale, partial, TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """θ = m + σ·ε with σ = scale/√p, and λ·Σ(m² + σ²) of every program."""
    part, places, flat, inside = _place(programs, parts, BLOCK)
    m = tl.load(mean + flat, mask=inside, other=0.0)
    root = 1 / tl.sqrt(tl.load(precision + flat, mask=inside, other=1.0))
    theta = m + tl.load(noise + flat, mask=inside, other=0.0) * root * scale
    tl.store(_at(thetas, part, places, TYPE), theta.to(TYPE), mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, ess * m * m + root * root, 0.0)))


@triton.jit
def _collect(
    programs,
    parts,
    thetas,
    gradients,
    mean,
    h_hat,
    partial,
    ADD: tl.constexpr,
    SQUARED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ĥ/(λ·p) = ĝ·(θ−m), or ĥ/B = ĝ², m into the parameters, and what `_squares` gives."""
    part, places, flat, inside = _place(programs, parts, BLOCK)
    pointer = _at(thetas, part, places, TYPE)
    m = tl.load(mean + flat, mask=inside, other=0.0)
    theta = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(_at(gradients, part, places, TYPE), mask=inside, other=0.0).to(tl.float32)
    h = (gradient if SQUARED else theta - m) * gradient
    if ADD:
        h += tl.load(h_hat + flat, mask=inside, other=0.0)
    tl.store(h_hat + flat, h, mask=inside)
    tl.store(pointer, m.to(TYPE), mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(gradient * gradient) + tl.sum(gradient - gradient))


@triton.jit
def _squares(programs, parts, gradients, partial, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Σĝ² of every program; the second sum makes it NaN where ĝ is not finite."""
    part, places, _, inside = _place(programs, parts, BLOCK)
    gradient = tl.load(_at(gradients, part, places, TYPE), mask=inside, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(gradient * gradient) + tl.sum(gradient - gradient))


@triton.jit
def _sum(parts, partial, sums, BLOCK: tl.constexpr):
    """Add up what the programs of a part gave, always in the same order."""
    first, count = tl.load(parts + 4 * tl.program_id(0) + 2), tl.load(parts + 4 * tl.program_id(0) + 3)
    total = 0.0
    for start in range(0, count, BLOCK):
        others = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(partial + first + others, mask=others < count, other=0.0))
    tl.store(sums + tl.program_id(0), total)


@triton.jit
def _first_bad(squares, numbers, tensors, BLOCK: tl.constexpr):
    """Return the sum of squares, and the number of the first tensor in which they are NaN, or `tensors`."""
    total, first = 0.0, tl.full((), 0, tl.int64) + tensors
    for start in range(0, tensors, BLOCK):
        places = start + tl.arange(0, BLOCK)
        square = tl.load(squares + places, mask=places < tensors, other=0.0)
        number = tl.load(numbers + places, mask=places < tensors, other=0)
        total += tl.sum(square)
        first = tl.minimum(first, tl.min(tl.where(square == square, tensors, number)))
    return total, first


@triton.jit
def _judge(at_draw, now, numbers, report, decision, tensors, max_step, BLOCK: tl.constexpr):
    """`Kernels.judge`, in one program."""
    before, first_before = _first_bad(at_draw, numbers, tensors, BLOCK)
    after, first = _first_bad(now, numbers, tensors, BLOCK)
    # Clipping code makes one gradient that is not finite into many, so what was so at the draw is named first.
    first = tl.where(before - before == 0, first, first_before)
    taken = tl.where((before - before) + (after - after) == 0, 1, 0)  # as infinity − infinity is not a number
    tl.store(decision, taken.to(tl.float32))
    tl.store(decision + 1, tl.where(before > 0, tl.minimum(tl.sqrt(after) / tl.sqrt(before), max_step), 1.0))
    tl.store(report, tl.load(report) + 1 - taken)
    tl.store(report + 1, (tl.load(report + 1) + 1) * (1 - taken))
    tl.store(report + 2, tl.load(report + 2) * taken + first * (1 - taken))


@triton.jit
def _update(
    programs,
    parts,
    thetas,
    gradients,
    mean,
    momentum,
    precision,
    h_hat,
    deltas,
    debias,
    rates,
    memories,
    unseen,
    losses,
    decision,
    prior_mean,
    prior_precision,
    one_minus_beta1,
    per_h_hat,
    bound,
    max_step,
    floor,
    ceiling,
    rounding,
    FIXED: tl.constexpr,
    OWN: tl.constexpr,
    SQUARED: tl.constexpr,
    ADAM: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step, as in `Kernels.update`; OWN: every weight has a prior of its own."""
    part, places, flat, _ = _place(programs, parts, BLOCK)
    inside = places < tl.load(parts + 4 * part) * tl.load(decision).to(tl.int64)
    m = tl.load(mean + flat, mask=inside, other=0.0)
    g = tl.load(momentum + flat, mask=inside, other=0.0)
    p = tl.load(precision + flat, mask=inside, other=1.0)
    h = tl.load(h_hat + flat, mask=inside, other=0.0)
    gradient = tl.load(_at(gradients, part, places, TYPE), mask=inside, other=0.0).to(tl.float32)
    delta, rate, memory = tl.load(deltas + part), tl.load(rates + part), tl.load(memories + part)
    scale = tl.load(decision + 1)
    away = m
    if OWN:
        delta = delta * tl.load(prior_precision + flat, mask=inside, other=1.0)
        away = m - tl.load(prior_mean + flat, mask=inside, other=0.0)

    g += one_minus_beta1 * (gradient - g)
    if SQUARED:
        d = memory * ((per_h_hat * scale * scale * h + delta) / p - 1)
    else:
        d = memory * (delta / p - 1 + per_h_hat * scale * h)
    d = tl.maximum(tl.where(d == d, d, 0.0), -max_step)
    if SQUARED:
        p += p * d
    else:
        p += p * (d + 0.5 * d * d)
    p = tl.minimum(tl.maximum(p, floor), ceiling)
    direction = g / tl.load(debias + part)
    if FIXED:
        direction += delta * away
    divisor = p
    if ADAM:
        rest = tl.maximum(p - tl.load(unseen + part), rounding * p)
        divisor = tl.sqrt(rest / (tl.load(losses + part) * bound * bound))
    m -= rate * tl.minimum(tl.maximum(direction / divisor, -bound), bound)

    tl.store(momentum + flat, g, mask=inside)
    tl.store(precision + flat, p, mask=inside)
    tl.store(mean + flat, m, mask=inside)
    tl.store(_at(thetas, part, places, TYPE), m.to(TYPE), mask=inside)


noise = plain.noise


def draw(chunk: Chunk, noise: Tensor, ess: float) -> Tensor:
    """Draw θ = m + σ·ε; see `Kernels.draw`."""
    flats = noise, chunk.mean, chunk.precision
    return _launch_summed(_draw, chunk, _table(chunk, "thetas", chunk.thetas), *flats, float(ess), ess**-0.5)


def collect(chunk: Chunk, h_hat: Tensor, *, add: bool, squared: bool = False) -> Tensor:
    """Collect ĥ/(λ·p) = ĝ·(θ−m), or ĥ/B = ĝ²; see `Kernels.collect`."""
    gradients = _gradients(chunk)
    tables = _table(chunk, "thetas", chunk.thetas), _table(chunk, "gradients", gradients)
    return _launch_summed(_collect, chunk, *tables, chunk.mean, h_hat, ADD=add, SQUARED=squared)


def squares(chunk: Chunk) -> Tensor:
    """Return Σĝ² by part; see `Kernels.squares`."""
    gradients = _gradients(chunk)
    return _launch_summed(_squares, chunk, _table(chunk, "gradients", gradients))


def judge(
    at_draw: Tensor, now: Tensor, numbers: Tensor, report: Sequence[int] | Tensor
) -> tuple[StepDecision, Sequence[int] | Tensor]:
    """Decide whether the step is taken; see `Kernels.judge`."""
    counts = report if isinstance(report, Tensor) else torch.tensor(report)
    counts = to_device(counts, now.device) if counts.device != now.device else counts
    decision = torch.empty(2, device=now.device)
    with torch.cuda.device_of(now):
        _judge[(1,)](at_draw, now, numbers, counts, decision, len(numbers), MAX_STEP, BLOCK=_BLOCK)
    return decision, counts


def update(chunk: Chunk, h_hat: Tensor, terms: Terms, decision: StepDecision, c: Constants) -> None:
    """Take the step; see `Kernels.update`."""
    gradients = _gradients(chunk)
    decision = decision if isinstance(decision, Tensor) else to_device(decision, chunk.mean.device)
    prior = chunk.prior or (chunk.mean, chunk.mean)  # which is not read
    _launch(
        _update,
        chunk,
        *(_table(chunk, "thetas", chunk.thetas), _table(chunk, "gradients", gradients)),
        *(chunk.mean, chunk.momentum, chunk.precision, h_hat, *terms, decision, *prior),
        *(1 - c.beta1, c.ess if c.batch is None else c.batch, c.bound),
        *(MAX_STEP, PRECISION_FLOOR, PRECISION_CEILING, ROUNDING),
        FIXED=c.fixed,
        OWN=chunk.prior is not None,
        SQUARED=c.batch is not None,
        ADAM=c.adam,
    )


def _launch(kernel: Any, chunk: Chunk, *arguments: Any, **constants: Any) -> None:
    programs, parts = _tables(chunk)
    dtype = _TYPES[chunk.params[0].dtype]
    with torch.cuda.device_of(chunk.mean):
        kernel[(len(programs),)](programs, parts, *arguments, TYPE=dtype, BLOCK=_BLOCK, **constants)


def _launch_summed(kernel: Any, chunk: Chunk, *arguments: Any, **constants: Any) -> Tensor:
    """Launch a kernel whose programs put a number each into `partial`, its last argument; return the sums by part."""
    programs, parts = _tables(chunk)
    partial = torch.empty(len(programs), device=chunk.mean.device)
    _launch(kernel, chunk, *arguments, partial, **constants)
    sums = torch.empty(len(parts), device=partial.device)
    with torch.cuda.device_of(partial):
        _sum[(len(parts),)](parts, partial, sums, BLOCK=_BLOCK)
    return sums


def _tables(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return the part and the first place of every program, and size, start, first program and their number by part."""
    if "layout" not in chunk.tables:
        programs: list[tuple[int, int]] = []
        parts = []
        for i, (size, start) in enumerate(zip(chunk.sizes, chunk.starts, strict=True)):
            firsts = range(0, size, _BLOCK)
            parts.append((size, start, len(programs), len(firsts)))
            programs += [(i, first) for first in firsts]
        chunk.tables["layout"] = tuple(to_device(table, chunk.mean.device) for table in (programs, parts))
    return chunk.tables["layout"]


def _table(chunk: Chunk, name: str, tensors: list[Tensor]) -> Tensor:
    """Return the addresses of tensors, which most often are those of the last time."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    if chunk.tables.get(name, ([], None))[0] != addresses:
        chunk.tables[name] = (addresses, to_device(addresses, chunk.mean.device))
    return chunk.tables[name][1]


def _gradients(chunk: Chunk) -> list[Tensor]:
    # Copies, where it needs them, live until the launch, which is early enough: the device works in order.
    return [gradient.contiguous() for gradient in chunk.gradients]
