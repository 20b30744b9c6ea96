"""An adapter read as a posterior, with or without σ."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import IVONError, parameter
from ..storage.format import SIGMA_FILE
from .adapter import Adapter
from .posterior import Posterior
from .tensors import Tensors


def open_posterior(adapter: str | Path, mean_only: bool = False) -> Posterior:
    """Read an adapter; one without σ serves as a posterior without width where no more than the mean is wanted.

    Raises:
        IVONError: the adapter cannot be read, or has no σ and more than the mean is wanted.
    """
    held = Adapter(adapter)
    if held.sigma is not None:
        return Posterior.from_pretrained(adapter)
    if not mean_only:
        raise IVONError(
            f"{adapter} has no {SIGMA_FILE}, so there are no draws and no pruning; evaluate it with "
            f"{parameter('rows')} base,mean"
        )
    specs = {key: ("F32", shape) for key, (_, shape) in held.mean.specs.items()}
    zeros = Tensors(specs, lambda key: np.zeros(specs[key][1], np.float32))
    return Posterior(held.mean, zeros, {}, held.config, folder=held.folder)
