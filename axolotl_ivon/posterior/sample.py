"""Ensembles: folders of adapters drawn from a posterior, each one complete."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..errors import IVONError, param_ref
from ..storage.atomic import check_space, in_bytes, new_folder
from ..storage.dtypes import CHOICES, SAFETENSORS
from ..storage.format import CONFIG_FILE, ENSEMBLE_FILE, MEAN_FILE, moved_config, write_json
from .posterior import Posterior
from .tensors import Progress, Tensors, write_tensors


def check_members(members: int, dtype: str | None = None) -> None:
    """Raise IVONError for no members or an unknown dtype: worth asking before reading."""
    if members < 1:
        raise IVONError(f"{members} members make no ensemble; ask for at least 1")
    if dtype is not None and dtype not in CHOICES:
        raise IVONError(f"{param_ref('dtype')} {dtype!r} is unknown; choose one of {', '.join(CHOICES)}")


def ensemble_bytes(posterior: Posterior, members: int, dtype: str | None = None, include_mean: bool = False) -> int:
    """Return how many bytes the tensors take that `sample` writes with these arguments."""
    return (members + include_mean) * posterior.draw(dtype=SAFETENSORS[dtype] if dtype else None).bytes


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
        IVONError: no member is asked for, the dtype is unknown, the disk has no room, or the folder exists or cannot be
            written.
    """
    check_members(members, dtype)
    kind = SAFETENSORS[dtype] if dtype else None
    source = source or str(posterior.folder)
    count = members + include_mean
    weights, size = count * posterior.mean.weights, ensemble_bytes(posterior, members, dtype, include_mean)
    what = f"{count:,} adapter{'s' if count > 1 else ''}"
    doing = f"drawing {what}, {in_bytes(size)}"
    check_space(Path(folder), size, what)
    names = [*(["mean"] if include_mean else []), *(f"sample-{member:04d}" for member in range(members))]

    def draw(name: str) -> Tensors:
        if name == "mean":
            return posterior.temper(math.inf).draw(dtype=kind)
        return posterior.draw(seed, int(name.removeprefix("sample-")), kind)

    def done(_: str, drawn: int, __: int) -> None:
        if progress:
            progress(doing, drawn, weights)

    config = moved_config(posterior.config, posterior.folder, Path(folder) / names[0])
    with new_folder(Path(folder), overwrite, posterior.inputs) as new:
        for name in names:
            (new / name).mkdir()
            write_json(new / name / CONFIG_FILE, config)
            write_tensors(new / name / MEAN_FILE, draw(name), {"format": "pt"}, done)
        write_json(
            new / ENSEMBLE_FILE,
            {
                "source": os.path.abspath(source) if Path(source).is_dir() else source,
                "seed": seed,
                "tau": posterior.tau if math.isfinite(posterior.tau) else "inf",
                "pruned_ratio": posterior.pruned_ratio,
                "members": names,
            },
        )
    return names
