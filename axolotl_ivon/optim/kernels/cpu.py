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

from ...noise import mixed, quantiles
from . import plain
from .base import PRECISION_CEILING, PRECISION_FLOOR, TRAVEL, Chunk, Constants

PARTS, GAPS = 4.0, False  # it is the noise alone that must stay in the cache

_16, _32, _48, _BITS = np.uint64(16), np.uint64(32), np.uint64(48), np.uint64(0xFFFF)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_FLOOR, _CEILING = np.float32(PRECISION_FLOOR), np.float32(PRECISION_CEILING)
_TRAVEL, _INFINITY, _NAN = np.float32(TRAVEL), np.float32(np.inf), np.float32(np.nan)


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


_mixed = _compiled(mixed)


@_compiled
def _at(address: Any, size: Any) -> Any:
    return carray(_pointer(address), size)  # type: ignore[call-arg]


@_compiled
def _noise(noise: Any, sizes: Any, seeds: Any, table: Any) -> None:
    stop = 0
    for part in range(len(sizes)):
        start, stop = stop, stop + sizes[part]
        noise_, first, stride = noise[start:stop], seeds[part, 0], seeds[part, 1]
        for i in range(len(noise_) // 2):
            z = _mixed(np.uint64(i), first, stride)
            noise_[2 * i] = table[z & _BITS] + table[(z >> _16) & _BITS]
            noise_[2 * i + 1] = table[(z >> _32) & _BITS] + table[z >> _48]
        if len(noise_) % 2:
            z = _mixed(np.uint64(len(noise_) // 2), first, stride)
            noise_[-1] = table[z & _BITS] + table[(z >> _16) & _BITS]


@_compiled
def _draw(m: Any, p: Any, noise: Any, thetas: Any, sizes: Any, ess: Any, inverse_root_ess: Any, moments: Any) -> None:
    stop = 0
    for part in range(len(sizes)):
        start, stop = stop, stop + sizes[part]
        m_, p_, noise_, theta_ = m[start:stop], p[start:stop], noise[start:stop], _at(thetas[part], sizes[part])
        squares, variances = _ZERO, _ZERO
        for i in range(len(m_)):
            root = _ONE / np.sqrt(p_[i])
            theta_[i] = m_[i] + noise_[i] * root * inverse_root_ess
            squares += m_[i] * m_[i]
            variances += root * root
        moments[part] = ess * squares + variances


@_compiled
def _collect(m: Any, h_hat: Any, thetas: Any, gradients: Any, sizes: Any, add: Any) -> None:
    stop = 0
    for part in range(len(sizes)):
        start, stop = stop, stop + sizes[part]
        m_, h_ = m[start:stop], h_hat[start:stop]
        theta_, gradient_ = _at(thetas[part], sizes[part]), _at(gradients[part], sizes[part])
        if add:
            for i in range(len(m_)):
                h_[i] += (theta_[i] - m_[i]) * gradient_[i]
                theta_[i] = m_[i]
        else:
            for i in range(len(m_)):
                h_[i] = (theta_[i] - m_[i]) * gradient_[i]
                theta_[i] = m_[i]


@_compiled
def _squares(gradients: Any, sizes: Any, sums: Any) -> None:
    for part in range(len(sizes)):
        gradient_ = _at(gradients[part], sizes[part])
        total = _ZERO
        for i in range(len(gradient_)):
            total += gradient_[i] * gradient_[i]
        if not total < _INFINITY:
            for i in range(len(gradient_)):
                if not abs(gradient_[i]) < _INFINITY:
                    total = _NAN
        sums[part] = total


@_compiled
def _update(
    m: Any,
    g: Any,
    p: Any,
    h_hat: Any,
    thetas: Any,
    gradients: Any,
    sizes: Any,
    deltas: Any,
    debias: Any,
    fixed: Any,
    one_minus_beta1: Any,
    one_minus_beta2: Any,
    per_h_hat: Any,
    bound: Any,
    lr: Any,
) -> None:
    stop = 0
    for part in range(len(sizes)):
        start, stop = stop, stop + sizes[part]
        m_, g_, p_, h_ = m[start:stop], g[start:stop], p[start:stop], h_hat[start:stop]
        theta_, gradient_ = _at(thetas[part], sizes[part]), _at(gradients[part], sizes[part])
        delta, inverse_debias = deltas[part], _ONE / debias[part]
        decay = delta if fixed else _ZERO
        for i in range(len(m_)):
            g_i = g_[i] + one_minus_beta1 * (gradient_[i] - g_[i])
            d = one_minus_beta2 * (delta / p_[i] - _ONE) + per_h_hat * h_[i]
            d = d if d == d else _ZERO
            d = d if d > -_TRAVEL else -_TRAVEL
            p_i = p_[i] + p_[i] * (d + _HALF * d * d)
            p_i = p_i if p_i > _FLOOR else _FLOOR
            p_i = p_i if p_i < _CEILING else _CEILING
            direction = (g_i * inverse_debias + decay * m_[i]) / p_i
            direction = direction if direction < bound else bound
            direction = direction if direction > -bound else -bound
            m_i = m_[i] - lr * direction
            g_[i], p_[i], m_[i], theta_[i] = g_i, p_i, m_i, m_i


def noise(chunk: Chunk, seeds: np.ndarray) -> Tensor:
    """Return ε ~ N(0, I); see `Kernels.noise`."""
    out = torch.empty_like(chunk.mean)
    _noise(out.numpy(), np.array(chunk.sizes), seeds, quantiles())
    return out


def draw(chunk: Chunk, noise: Tensor, ess: float) -> Tensor:
    """θ = m + σ·ε; see `Kernels.draw`."""
    if (thetas := _addresses(chunk.thetas)) is None:
        return plain.draw(chunk, noise, ess)
    moments = torch.empty(len(chunk.sizes))
    m, p, eps = (flat.numpy() for flat in (chunk.mean, chunk.precision, noise))
    _draw(m, p, eps, thetas, np.array(chunk.sizes), np.float32(ess), np.float32(ess**-0.5), moments.numpy())
    return moments


def collect(chunk: Chunk, h_hat: Tensor, *, add: bool) -> None:
    """ĥ/(λ·p) = ĝ·(θ−m); see `Kernels.collect`."""
    thetas, gradients = _addresses(chunk.thetas), _addresses(chunk.gradients)
    if thetas is None or gradients is None:
        plain.collect(chunk, h_hat, add=add)
    else:
        _collect(chunk.mean.numpy(), h_hat.numpy(), thetas, gradients, np.array(chunk.sizes), add)


def squares(chunk: Chunk) -> Tensor:
    """Σĝ² by part; see `Kernels.squares`."""
    if (gradients := _addresses(chunk.gradients)) is None:
        return plain.squares(chunk)
    sums = torch.empty(len(chunk.sizes))
    _squares(gradients, np.array(chunk.sizes), sums.numpy())
    return sums


def update(chunk: Chunk, h_hat: Tensor, deltas: Tensor, debias: Tensor, taken: Tensor | None, c: Constants) -> None:
    """Take the step; see `Kernels.update`."""
    if taken is not None and not taken:
        return
    thetas, gradients = _addresses(chunk.thetas), _addresses(chunk.gradients)
    if thetas is None or gradients is None:
        plain.update(chunk, h_hat, deltas, debias, None, c)
        return
    flats = (flat.numpy() for flat in (chunk.mean, chunk.momentum, chunk.precision, h_hat))
    numbers = (1 - c.beta1, 1 - c.beta2, (1 - c.beta2) * c.ess, c.bound, c.lr)
    _update(
        *flats,
        thetas,
        gradients,
        np.array(chunk.sizes),
        deltas.numpy(),
        debias.numpy(),
        c.fixed,
        *map(np.float32, numbers),
    )


def _addresses(tensors: list[Tensor]) -> np.ndarray | None:
    """Return where tensors are in memory, or None where the kernels cannot work on one of them."""
    if all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return np.array([tensor.data_ptr() for tensor in tensors])
    return None
