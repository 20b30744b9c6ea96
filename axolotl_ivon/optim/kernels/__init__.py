"""The kernels of the optimizer: what runs over every weight. `base.Kernels` says what they do.

`plain` works everywhere, `cpu` (numba) and `gpu` (Triton) are quicker. The environment variable IVON_KERNELS names one
of the three; without it the device decides. Every other kernel is checked against `plain` before use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import IVONError, one_line
from . import plain
from .base import Kernels, agree, trial

LOG = logging.getLogger(__name__)

VARIABLE = "IVON_KERNELS"
_LIBRARIES = {"cpu": "numba", "gpu": "triton"}
_BY_DEVICE = {"cpu": "cpu", "cuda": "gpu"}
# Weights from which on a CPU the seconds that numba takes are worth it.
_COMPILED = 2**18


def wanted() -> str | None:
    """Return the kernels that the environment asks for, or None.

    Raises:
        IVONError: if it names something else.
    """
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in ("plain", *_LIBRARIES):
        raise IVONError(f"{VARIABLE}={name}: must be plain, cpu or gpu")
    return name


def choose(params: Sequence[Tensor]) -> Kernels:
    """Return the kernels for parameters of one device and dtype.

    Raises:
        IVONError: if the environment asks for kernels that cannot be used on them.
    """
    device, dtype = params[0].device, params[0].dtype
    asked = wanted()
    name = asked or _BY_DEVICE.get(device.type, "plain")
    if asked is None and name == "cpu" and sum(param.numel() for param in params) < _COMPILED:
        name = "plain"
    if name == "plain":
        return plain
    kernels = _tried(name, device, dtype if name == "gpu" else torch.float32)
    reason = kernels if isinstance(kernels, str) else ""
    if name == "gpu" and not all(param.is_contiguous() for param in params):
        reason = "a parameter is not contiguous"
    if not reason:
        return kernels
    if asked:
        raise IVONError(f"{VARIABLE}={name} cannot be used for {dtype} parameters on {device}: {reason}")
    if importlib.util.find_spec(_LIBRARIES[name]) is not None:  # a missing library needs no warning
        _warn(f"the {name} kernels are not used for {dtype} parameters on {device}, which costs time only: {reason}")
    return plain


@functools.cache
def _tried(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return kernels that agree with the plain ones, or why they cannot be used: a library, compiler or driver."""
    if name == "cpu" and device.type != "cpu":
        return "they are for a CPU"
    if importlib.util.find_spec(_LIBRARIES[name]) is None:
        return f"{_LIBRARIES[name]} is not installed"
    try:
        kernels: Any = importlib.import_module(f".{name}", __name__)
        agree(kernels, plain, device)
        if dtype != torch.float32:
            trial(kernels, device, dtype)
    except Exception as error:
        return one_line(error) or type(error).__name__
    return kernels


@functools.cache
def _warn(message: str) -> None:
    LOG.warning("%s", message)
