"""The hooks through which axolotl-ivon is extended.

A third party declares an entry point in the group `axolotl_ivon` that names a module (or object) with
functions marked by `axolotl_ivon.hookimpl`. What ships with the project is registered through the same hooks
(see `plugins.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click
    import numpy as np
    import torch
    from transformers import Trainer

PROJECT = "axolotl_ivon"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# A pruning criterion maps one tensor's (name, mean, sigma, generator), float32 arrays of its shape that it must not
# change, to finite scores of that shape; the weights with the smallest are pruned. The generator is that tensor's own.
Criterion = Callable[["str", "np.ndarray", "np.ndarray", "np.random.Generator"], "np.ndarray"]


@hookspec(firstresult=True)
def create_optimizer(
    named_parameters: list[tuple[str, torch.nn.Parameter]], settings: Mapping[str, Any]
) -> torch.optim.Optimizer | None:
    """Return the optimizer that `attach` trains with: an `IVONLoRA` or something with its interface."""


@hookspec(firstresult=True)
def sampling_context(trainer: Trainer, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None] | None:
    """Return the context that one forward and backward pass of the training loop runs in."""


@hookspec
def log_metrics(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return metrics that are added to the Trainer's log at every logging step."""


@hookspec
def posterior_saved(folder: str) -> None:
    """Act after an adapter and its `ivon_sigma.safetensors` were written to `folder`."""


@hookspec
def pruning_criteria() -> dict[str, Criterion]:
    """Return pruning criteria by name, for `Posterior.prune` and `ivon-post prune --criterion`."""


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to `ivon-post`; import what is heavy inside the command, not beside it."""
