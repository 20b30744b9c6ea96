"""The optimizer's arithmetic compiled by numba: each weight passes through a CPU once for a draw and once for a step.

numba comes with axolotl; without it the plain operations do the same in several passes.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...noise import mixed, quantiles
from .base import PRECISION_CEILING, PRECISION_FLOOR, TRAVEL, Constants
from .plain import Arithmetic

if TYPE_CHECKING:
    from ..buffers import Piece

LOG = logging.getLogger(__name__)

# What lets sums be vectorized; a NaN stays one.
_FASTMATH = {"reassoc", "contract", "nsz"}
# Compiled before the kernels, which call them: (address, size) -> array, and noise.mixed.
_at: Any = None
_mixed: Any = None
_16, _32, _48, _BITS = np.uint64(16), np.uint64(32), np.uint64(48), np.uint64(0xFFFF)


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


def _draw(m: Any, p: Any, noise: Any, thetas: Any, sizes: Any, inverse_root_ess: Any, norms: Any) -> None:
    stop = 0
    for tensor in range(len(sizes)):
        start, stop = stop, stop + sizes[tensor]
        m_, p_, noise_, theta_ = m[start:stop], p[start:stop], noise[start:stop], _at(thetas[tensor], sizes[tensor])
        squares, variances = np.float32(0), np.float32(0)
        for i in range(len(m_)):
            root = np.float32(1) / np.sqrt(p_[i])
            theta_[i] = m_[i] + noise_[i] * root * inverse_root_ess
            squares += m_[i] * m_[i]
            variances += root * root
        norms[0, tensor], norms[1, tensor] = np.sqrt(squares), np.sqrt(variances)


def _collect(m: Any, product: Any, thetas: Any, gradients: Any, sizes: Any) -> None:
    stop = 0
    for tensor in range(len(sizes)):
        start, stop = stop, stop + sizes[tensor]
        m_, product_ = m[start:stop], product[start:stop]
        theta_, gradient_ = _at(thetas[tensor], sizes[tensor]), _at(gradients[tensor], sizes[tensor])
        for i in range(len(m_)):
            product_[i] = (theta_[i] - m_[i]) * gradient_[i]
            theta_[i] = m_[i]


def _gradient_norm(gradients: Any, sizes: Any) -> Any:
    total = np.float32(0)
    for tensor in range(len(sizes)):
        gradient_ = _at(gradients[tensor], sizes[tensor])
        squares = np.float32(0)
        for i in range(len(gradient_)):
            squares += gradient_[i] * gradient_[i]
        total += squares
    return np.sqrt(total)


def _update(
    m: Any,
    g: Any,
    p: Any,
    product: Any,
    thetas: Any,
    gradients: Any,
    sizes: Any,
    deltas: Any,
    one_minus_beta1: Any,
    one_minus_beta2: Any,
    per_product: Any,
    inverse_debias: Any,
    fixed_delta: Any,
    bound: Any,
    lr: Any,
    travel: Any,
    floor: Any,
    ceiling: Any,
) -> None:
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
    stop = 0
    for tensor in range(len(sizes)):
        start, stop = stop, stop + sizes[tensor]
        m_, g_, p_, product_ = m[start:stop], g[start:stop], p[start:stop], product[start:stop]
        theta_, gradient_ = _at(thetas[tensor], sizes[tensor]), _at(gradients[tensor], sizes[tensor])
        delta = deltas[tensor]
        for i in range(len(m_)):
            g_i = g_[i] + one_minus_beta1 * (gradient_[i] - g_[i])
            d = one_minus_beta2 * (delta / p_[i] - one) + per_product * product_[i]
            d = d if d == d else zero
            d = d if d > -travel else -travel
            p_i = p_[i] + p_[i] * (d + half * d * d)
            p_i = p_i if p_i > floor else floor
            p_i = p_i if p_i < ceiling else ceiling
            direction = (g_i * inverse_debias + fixed_delta * m_[i]) / p_i
            direction = direction if direction < bound else bound
            direction = direction if direction > -bound else -bound
            m_i = m_[i] - lr * direction
            g_[i], p_[i], m_[i], theta_[i] = g_i, p_i, m_i, m_i


class CompiledArithmetic(Arithmetic):
    """`Arithmetic` in one pass each, on float32 parameters; on others in torch's operations."""

    PARTS = 4  # each passes through the CPU once, so it is the noise alone that must stay in the cache

    _noise: Any
    _draw: Any
    _collect: Any
    _gradient_norm: Any
    _update: Any

    @classmethod
    def noise(cls, noise: Tensor, sizes: list[int], seeds: np.ndarray) -> None:
        """Put ε ~ N(0, I) into `noise`, the same that `Arithmetic` does."""
        cls._noise(noise.numpy(), np.array(sizes), seeds, quantiles())

    @classmethod
    def draw(cls, piece: Piece, noise: Tensor, ess: float) -> Tensor:
        """Put θ = m + σ·ε into the parameters; return the norms of m and of √λ·σ by tensor."""
        thetas = _addresses(piece.thetas)
        if thetas is None:
            return Arithmetic.draw(piece, noise, ess)
        norms = np.empty((2, len(piece.sizes)), np.float32)
        m, p = piece.mean.numpy(), piece.precision.numpy()
        cls._draw(m, p, noise.numpy(), thetas, np.array(piece.sizes), np.float32(ess**-0.5), norms)
        return torch.from_numpy(norms)

    @classmethod
    def collect(cls, piece: Piece, product: Tensor) -> None:
        """Note ĝ·(θ−m) in `product` and put the mean back."""
        thetas, gradients = _addresses(piece.thetas), _addresses(piece.gradients)
        if thetas is None or gradients is None:
            Arithmetic.collect(piece, product)
        else:
            cls._collect(piece.mean.numpy(), product.numpy(), thetas, gradients, np.array(piece.sizes))

    @classmethod
    def gradient_norm(cls, piece: Piece) -> float:
        """Return the norm of the gradients."""
        gradients = _addresses(piece.gradients)
        if gradients is None:
            return Arithmetic.gradient_norm(piece)
        return float(cls._gradient_norm(gradients, np.array(piece.sizes)))

    @classmethod
    def update(cls, piece: Piece, product: Tensor, deltas: list[float], c: Constants) -> None:
        """Take one step, from ĝ in .grad and ĝ·(θ−m)."""
        thetas, gradients = _addresses(piece.thetas), _addresses(piece.gradients)
        if thetas is None or gradients is None:
            Arithmetic.update(piece, product, deltas, c)
            return
        numbers = (
            1 - c.beta1,
            1 - c.beta2,
            (1 - c.beta2) * c.product,
            1 / c.debias,
            deltas[0] if c.fixed else 0.0,
            c.bound,
            c.lr,
            TRAVEL,
            PRECISION_FLOOR,
            PRECISION_CEILING,
        )
        cls._update(
            *(flat.numpy() for flat in (piece.mean, piece.momentum, piece.precision, product)),
            thetas,
            gradients,
            np.array(piece.sizes),
            np.array(deltas, np.float32),
            *map(np.float32, numbers),
        )


def _addresses(tensors: list[Tensor]) -> np.ndarray | None:
    """Return where tensors are in memory, or None where the kernels cannot work on one of them."""
    if all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return np.array([tensor.data_ptr() for tensor in tensors])
    return None


def _try(made: type[Arithmetic]) -> None:
    """Compile the kernels, which numba does at their first call."""
    from ..buffers import Block

    param = torch.nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    block = Block({"h0": 1.0, "ess": 1.0, "prior": 1.0}, [param], {}, (0, 0))
    [piece] = block.pieces([0])
    with torch.no_grad():
        made.noise(torch.ones(1), [1], np.ones((1, 2), np.uint64))
        made.draw(piece, torch.ones(1), 1.0)
        made.collect(piece, torch.ones(1))
        made.gradient_norm(piece)
        made.update(piece, torch.ones(1), [1.0], Constants(1.0, 0.9, 0.9, 1.0, 1.0, 0.1, True))


@functools.cache
def arithmetic() -> type[Arithmetic] | None:
    """Return the compiled arithmetic, or None where there is no numba or it cannot compile it."""
    if importlib.util.find_spec("numba") is None:
        return None
    global _at, _mixed
    try:
        import numba
        from numba.core import types
        from numba.extending import intrinsic

        @intrinsic
        def pointer(context: Any, address: Any) -> Any:
            def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

            return types.CPointer(types.float32)(types.int64), make

        compiled = numba.njit(nogil=True, fastmath=_FASTMATH, error_model="numpy")
        _at = compiled(lambda address, size: numba.carray(pointer(address), size))  # type: ignore[call-arg]
        _mixed = compiled(mixed)
        kernels = {kernel.__name__: compiled(kernel) for kernel in (_noise, _draw, _collect, _gradient_norm, _update)}
        made = type("Compiled", (CompiledArithmetic,), kernels)
        _try(made)
        return made
    except Exception as error:
        LOG.warning("numba cannot compile the optimizer, which costs time only: %s", str(error).split("\n")[0])
        return None
