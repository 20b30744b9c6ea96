"""Ensembles: folders of adapters drawn from a posterior, each one complete."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..errors import IVONError, parameter
from ..storage.atomic import new_folder
from ..storage.dtypes import CHOICES, SAFETENSORS
from ..storage.format import CONFIG_FILE, ENSEMBLE_FILE, MEAN_FILE, write_json
from .posterior import Posterior
from .tensors import Progress, Tensors, write_tensors


def sample(
    posterior: Posterior,
    folder: str | os.PathLike[str],
    members: int,
    seed: int = 0,
    *,
    source: str = "",
    dtype: str | None = None,
    include_mean: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write `members` draws of `posterior` as PEFT adapters, and return the names of their folders.

    Member k is `posterior.sample(seed, k)`, whatever the number of members, in the mean's dtype or in `dtype`
    ("float32", "bfloat16", "float16"). With `include_mean`, the mean comes first, in `mean/`. `ensemble.json` records
    `source`, the seed, τ, the pruned ratio and the members. The folder appears whole, or not at all.

    Raises:
        IVONError: no member is asked for, the dtype is unknown, or the folder exists or cannot be written.
    """
    if members < 1:
        raise IVONError(f"{members} members make no ensemble; ask for at least 1")
    if dtype is not None and dtype not in CHOICES:
        raise IVONError(f"{parameter('dtype')} {dtype!r} is unknown; choose one of {', '.join(CHOICES)}")
    kind = SAFETENSORS[dtype] if dtype else None
    draws: dict[str, Tensors] = {}
    if include_mean:
        draws["mean"] = posterior.temper(math.inf).draw(dtype=kind)
    for member in range(members):
        draws[f"sample-{member:04d}"] = posterior.draw(seed, member, kind)
    weights = len(draws) * posterior.mean.weights

    def done(_: str, count: int, __: int) -> None:
        if progress:
            progress("drawing", count, weights)

    with new_folder(Path(folder), overwrite, posterior.inputs) as new:
        for name, tensors in draws.items():
            (new / name).mkdir()
            write_json(new / name / CONFIG_FILE, posterior.config)
            write_tensors(new / name / MEAN_FILE, tensors, {"format": "pt"}, done)
        write_json(
            new / ENSEMBLE_FILE,
            {
                "source": source or str(posterior.folder),
                "seed": seed,
                "tau": posterior.tau if math.isfinite(posterior.tau) else "inf",
                "pruned_ratio": posterior.pruned_ratio,
                "members": list(draws),
            },
        )
    return list(draws)
