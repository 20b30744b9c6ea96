"""Ensembles: folders of adapters drawn from a posterior, each one complete."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IVONError
from ..records.ensemble import EnsembleRecord
from ..reporter import SILENT, Reporter, Stage
from ..storage.atomic import check_space, in_bytes, new_folder
from ..storage.dtypes import NUMPY, SAFETENSORS
from ..storage.format import CONFIG_FILE, ENSEMBLE_FILE, MEAN_FILE, check_dtype, moved_config, write_json
from .combine import scaling
from .posterior import Posterior
from .tensors import Tensors, as_float32, write_tensors


@dataclass(frozen=True)
class EnsemblePlan:
    """Which adapters an ensemble has.

    Attributes:
        members: how many draws; member k is `posterior.sample(seed, k)`, whatever their number.
        seed: of the draws.
        dtype: "float32", "bfloat16", "float16", or None for the mean's.
        include_mean: whether the mean is there too, first, in `mean/`.
        one_scaling: whether all modules get the same rank and scaling, as vLLM has them, where the adapter has a
            `rank_pattern` or `alpha_pattern`: zeros fill up A and B, and B takes the scaling. The update is the same.

    Raises:
        IVONError: no member, or an unknown dtype.
    """

    members: int
    seed: int = 0
    dtype: str | None = None
    include_mean: bool = False
    one_scaling: bool = False

    def __post_init__(self) -> None:
        if self.members < 1:
            raise IVONError(f"{self.members} members make no ensemble; ask for at least 1")
        if self.dtype is not None:
            check_dtype(self.dtype)

    @property
    def adapters(self) -> int:
        """How many adapters there are."""
        return self.members + self.include_mean

    @property
    def names(self) -> list[str]:
        """The folder of each adapter."""
        return [*(["mean"] if self.include_mean else []), *(f"sample-{member:04d}" for member in range(self.members))]

    def adapter(self, posterior: Posterior, name: str) -> Tensors:
        """Return the tensors of the adapter called `name`."""
        dtype = SAFETENSORS[self.dtype] if self.dtype else None
        if name == "mean":
            tensors = posterior.temper(math.inf).draw(dtype=dtype)
        else:
            tensors = posterior.draw(self.seed, int(name.removeprefix("sample-")), dtype)
        return _with_one_scaling(posterior, tensors) if self._rewrites(posterior) else tensors

    def config(self, posterior: Posterior) -> dict[str, Any]:
        """Return the adapter_config.json of every adapter.

        Raises:
            IVONError: one scaling is asked for, and the adapter is on more than linear layers.
        """
        if not self._rewrites(posterior):
            return posterior.config
        if other := [key for key in posterior.mean if not key.endswith((".lora_A.weight", ".lora_B.weight"))]:
            raise IVONError(
                f"rank_pattern and alpha_pattern become one rank and scaling on linear layers alone, and {other[0]} is "
                "of another; `ivon-post merge` gives whole models"
            )
        rank = _largest_rank(posterior.mean)
        one = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return posterior.config | one

    def _rewrites(self, posterior: Posterior) -> bool:
        return self.one_scaling and any(posterior.config.get(name) for name in ("rank_pattern", "alpha_pattern"))

    def size(self, posterior: Posterior) -> int:
        """Return the bytes that the tensors of all adapters take."""
        return self.adapters * self.adapter(posterior, "sample-0").bytes


# In the header of σ, which members do not have.
_OF_CHATS = ("generation_prompt", "chat_template_kwargs", "system_prompt", "choices")


def sample(
    posterior: Posterior,
    folder: str | os.PathLike[str],
    plan: EnsemblePlan,
    source: str = "",
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> list[str]:
    """Write the adapters of `plan` as PEFT folders, and return the names of these.

    `ensemble.json` records `source`, the seed, τ, the pruned ratio and the members. The folder appears whole, or not at
    all.

    Raises:
        IVONError: the disk has no room, or the folder exists (and not `overwrite`) or cannot be written.
    """
    source = source or str(posterior.folder)
    size, what = plan.size(posterior), f"{plan.adapters:,} adapter{'s' if plan.adapters > 1 else ''}"
    check_space(Path(folder), size, what)
    drawing, weights = f"drawing {what}, {in_bytes(size)}", plan.adapters * posterior.mean.weights
    stage = Stage(reporter, drawing, weights, announced=False)
    names = plan.names
    config = moved_config(plan.config(posterior), posterior.folder, Path(folder) / names[0])
    with new_folder(Path(folder), overwrite, posterior.inputs) as new:
        for name in names:
            (new / name).mkdir()
            write_json(new / name / CONFIG_FILE, config)
            write_tensors(new / name / MEAN_FILE, plan.adapter(posterior, name), {"format": "pt"}, stage)
        EnsembleRecord(
            source=os.path.abspath(source) if Path(source).is_dir() else source,
            **{name: posterior.metadata[name] for name in _OF_CHATS if name in posterior.metadata},
            seed=plan.seed,
            tau=posterior.tau,
            pruned_ratio=posterior.pruned_ratio,
            members=names,
        ).save(new / ENSEMBLE_FILE)
    return names


def _largest_rank(tensors: Tensors) -> int:
    return max((shape[0] for key, (_, shape) in tensors.specs.items() if key.endswith(".lora_A.weight")), default=0)


def _with_one_scaling(posterior: Posterior, tensors: Tensors) -> Tensors:
    """Return LoRA factors of linear layers, as they are in `posterior`, with one rank everywhere and a scaling of 1."""
    rank = _largest_rank(tensors)
    axes = {key: int(key.endswith(".lora_B.weight")) for key in tensors}
    specs = {
        key: (dtype, tuple(rank if axis == axes[key] else size for axis, size in enumerate(shape)))
        for key, (dtype, shape) in tensors.specs.items()
    }

    def filled(key: str) -> np.ndarray:
        values = as_float32(tensors.raw(key))
        if axes[key]:
            values = values * np.float32(scaling(posterior, key))
        zeros = [(0, size - old) for size, old in zip(specs[key][1], values.shape, strict=True)]
        return np.pad(values, zeros).astype(NUMPY[specs[key][0]])

    return Tensors(specs, filled)
