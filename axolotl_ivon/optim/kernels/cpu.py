"""The kernels compiled by numba: each weight passes through a CPU once for a draw and once for a step.

numba comes with axolotl and is imported only where these kernels are. They work on float32 parameters, and leave
others to torch's operations. What is compiled is kept beside the source, or in the user's cache, for later processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from ...noise import quantiles, splitmix64
from . import plain
from .base import MAX_STEP, PRECISION_CEILING, PRECISION_FLOOR, ROUNDING, Chunk, Constants, StepDecision, Terms

PARTS, GAPS = 4.0, False  # it is the noise alone that must stay in the cache

_16, _32, _48, _BITS = np.uint64(16), np.uint64(32), np.uint64(48), np.uint64(0xFFFF)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_INFINITY, _NAN = np.float32(np.inf), np.float32(np.nan)
# Arguments of the kernel, not constants in it: what numba has cached does not notice that another file changes.
_LIMITS = (MAX_STEP, PRECISION_FLOOR, PRECISION_CEILING, ROUNDING)


def _compiled(function: Any) -> Any:
    # These liberties let sums be vectorized; a NaN stays one.
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that could keep it can be written in: each process compiles for itself
        return njit(**options)(function)


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """Return an address as a pointer to float32."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), make


_splitmix64 = _compiled(splitmix64)


@_compiled
def _at(address, size):
    return carray(_pointer(address), size)  # type: ignore[call-arg]


@_compiled
def _noise(noise, sizes, seeds, table):
    for part in range(len(sizes)):
        noise_, first, stride = _at(noise, sizes[part]), seeds[part, 0], seeds[part, 1]
        for i in range(len(noise_) // 2):
            z = _splitmix64(np.uint64(i), first, stride)
            noise_[2 * i] = table[z & _BITS] + table[(z >> _16) & _BITS]
            noise_[2 * i + 1] = table[(z >> _32) & _BITS] + table[z >> _48]
        if len(noise_) % 2:
            z = _splitmix64(np.uint64(len(noise_) // 2), first, stride)
            noise_[-1] = table[z & _BITS] + table[(z >> _16) & _BITS]
        noise += 4 * sizes[part]


@_compiled
def _draw(m, p, noise, thetas, sizes, ess, inverse_root_ess, moments):
    start = 0
    for part in range(len(sizes)):
        size = sizes[part]
        m_, p_ = _at(m + start, size), _at(p + start, size)
        noise_, theta_ = _at(noise + start, size), _at(thetas[part], size)
        squares, variances = _ZERO, _ZERO
        for i in range(size):
            root = _ONE / np.sqrt(p_[i])
            theta_[i] = m_[i] + noise_[i] * root * inverse_root_ess
            squares += m_[i] * m_[i]
            variances += root * root
        _at(moments, len(sizes))[part] = ess * squares + variances
        start += 4 * size


@_compiled
def _sum_of_squares(gradient):
    total = _ZERO
    for i in range(len(gradient)):
        total += gradient[i] * gradient[i]
    if not total < _INFINITY:
        for i in range(len(gradient)):
            if not abs(gradient[i]) < _INFINITY:
                total = _NAN
    return total


@_compiled
def _collect(m, h_hat, thetas, gradients, sizes, add, squared, sums):
    start = 0
    for part in range(len(sizes)):
        size = sizes[part]
        m_, h_ = _at(m + start, size), _at(h_hat + start, size)
        theta_, gradient_ = _at(thetas[part], size), _at(gradients[part], size)
        for i in range(size):
            h_i = (gradient_[i] if squared else theta_[i] - m_[i]) * gradient_[i]
            h_[i] = h_[i] + h_i if add else h_i
            theta_[i] = m_[i]
        _at(sums, len(sizes))[part] = _sum_of_squares(gradient_)  # which is in the cache
        start += 4 * size


@_compiled
def _squares(gradients, sizes, sums):
    for part in range(len(sizes)):
        _at(sums, len(sizes))[part] = _sum_of_squares(_at(gradients[part], sizes[part]))


def _update_where(own: bool, adam: bool) -> Any:
    """Return the kernel of a step; `own`: every weight has a prior of its own, m₀ and 1/σ₀² at `prior`."""

    def update(m, g, p, h_hat, thetas, gradients, sizes, terms, fixed, squared, numbers, prior):
        deltas, debias, rates, memories, unseen, losses = terms
        one_minus_beta1, per_h_hat, bound, max_step, floor, ceiling, rounding = numbers
        half = _ZERO if squared else _HALF
        start = 0
        for part in range(len(sizes)):
            size = sizes[part]
            m_, g_, p_ = _at(m + start, size), _at(g + start, size), _at(p + start, size)
            h_, theta_, gradient_ = _at(h_hat + start, size), _at(thetas[part], size), _at(gradients[part], size)
            center_, narrowness_ = _at(prior[0] + start, size), _at(prior[1] + start, size)  # read by `own` alone
            delta, inverse_debias = _at(deltas, len(sizes))[part], _ONE / _at(debias, len(sizes))[part]
            decay, rate = delta if fixed else _ZERO, _at(rates, len(sizes))[part]
            memory, unseen_ = _at(memories, len(sizes))[part], _at(unseen, len(sizes))[part]
            per_square = _ONE / (_at(losses, len(sizes))[part] * bound * bound)
            for i in range(size):
                delta_i = delta * narrowness_[i] if own else delta
                pull = delta_i * (m_[i] - center_[i]) if own else decay * m_[i]
                g_i = g_[i] + one_minus_beta1 * (gradient_[i] - g_[i])
                seen = per_h_hat * h_[i]
                seen = (seen + delta_i) / p_[i] if squared else seen + delta_i / p_[i]
                d = memory * (seen - _ONE)
                d = d if d == d else _ZERO
                d = d if d > -max_step else -max_step
                p_i = p_[i] + p_[i] * (d + half * d * d)
                p_i = p_i if p_i > floor else floor
                p_i = p_i if p_i < ceiling else ceiling
                rest = p_i - unseen_ if p_i - unseen_ > rounding * p_i else rounding * p_i
                divisor = np.sqrt(rest * per_square) if adam else p_i
                direction = (g_i * inverse_debias + pull) / divisor
                direction = direction if direction < bound else bound
                direction = direction if direction > -bound else -bound
                m_i = m_[i] - rate * direction
                g_[i], p_[i], m_[i], theta_[i] = g_i, p_i, m_i, m_i
            start += 4 * size

    return _compiled(update)


_update, _update_from_prior, _update_by_adam = (
    _update_where(*x) for x in ((False, False), (True, False), (False, True))
)


def noise(chunk: Chunk, seeds: np.ndarray) -> Tensor:
    """Return ε ~ N(0, I); see `Kernels.noise`."""
    out = torch.empty_like(chunk.mean)
    _noise(out.data_ptr(), np.array(chunk.sizes), seeds, quantiles())
    return out


def draw(chunk: Chunk, noise: Tensor, ess: float) -> Tensor:
    """Draw θ = m + σ·ε; see `Kernels.draw`."""
    if (thetas := _addresses(chunk.thetas)) is None:
        return plain.draw(chunk, noise, ess)
    moments = torch.empty(len(chunk.sizes))
    m, p, eps, out = (flat.data_ptr() for flat in (chunk.mean, chunk.precision, noise, moments))
    _draw(m, p, eps, thetas, np.array(chunk.sizes), np.float32(ess), np.float32(ess**-0.5), out)
    return moments


def collect(chunk: Chunk, h_hat: Tensor, *, add: bool, squared: bool = False) -> Tensor:
    """Collect ĥ/(λ·p) = ĝ·(θ−m), or ĥ/B = ĝ²; see `Kernels.collect`."""
    thetas, gradients = _addresses(chunk.thetas), _addresses(chunk.gradients)
    if thetas is None or gradients is None:
        return plain.collect(chunk, h_hat, add=add, squared=squared)
    sums = torch.empty(len(chunk.sizes))
    m, h, out = (flat.data_ptr() for flat in (chunk.mean, h_hat, sums))
    _collect(m, h, thetas, gradients, np.array(chunk.sizes), add, squared, out)
    return sums


def squares(chunk: Chunk) -> Tensor:
    """Return Σĝ² by part; see `Kernels.squares`."""
    if (gradients := _addresses(chunk.gradients)) is None:
        return plain.squares(chunk)
    sums = torch.empty(len(chunk.sizes))
    _squares(gradients, np.array(chunk.sizes), sums.data_ptr())
    return sums


judge = plain.judge


def update(chunk: Chunk, h_hat: Tensor, terms: Terms, decision: StepDecision, c: Constants) -> None:
    """Take the step; see `Kernels.update`."""
    thetas, gradients = _addresses(chunk.thetas), _addresses(chunk.gradients)
    taken, scale = decision
    if thetas is None or gradients is None:
        plain.update(chunk, h_hat, terms, decision, c)
    elif taken:
        m, g, p = chunk.mean, chunk.momentum, chunk.precision
        flats, by_part = (tuple(x.data_ptr() for x in xs) for xs in ((m, g, p, h_hat), terms))
        squared, scale = c.batch is not None, float(scale)
        per_h_hat = c.ess * scale if c.batch is None else c.batch * scale**2
        numbers = (1 - c.beta1, per_h_hat, c.bound, *_LIMITS)
        kernel = _update_by_adam if c.adam else _update_from_prior if chunk.prior else _update
        sizes = np.array(chunk.sizes)
        scalars = tuple(map(np.float32, numbers))
        prior = tuple(x.data_ptr() for x in chunk.prior or (m, m))
        kernel(*flats, thetas, gradients, sizes, by_part, c.fixed, squared, scalars, prior)


def _addresses(tensors: list[Tensor]) -> np.ndarray | None:
    """Return where tensors are in memory, or None where the kernels cannot work on one of them."""
    if all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return np.array([tensor.data_ptr() for tensor in tensors])
    return None
