"""What ships with axolotl-ivon, registered through the hooks that a third party would use."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .hookspecs import Criterion, hookimpl

if TYPE_CHECKING:
    import click
    import torch
    from transformers import Trainer


@hookimpl
def create_optimizer(
    named_parameters: list[tuple[str, torch.nn.Parameter]], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    from .optim.ivon import IVONLoRA

    return IVONLoRA(named_parameters, **settings)


@hookimpl
def sampling_context(trainer: Trainer, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    return optimizer.sampled_params()  # type: ignore[attr-defined]


@hookimpl
def log_metrics(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return optimizer.summary()  # type: ignore[attr-defined]


@hookimpl
def pruning_criteria() -> dict[str, Criterion]:
    from .posterior.prune import CRITERIA

    return CRITERIA


@hookimpl
def register_commands(cli: click.Group) -> None:
    from ivon_post import COMMANDS

    for command in COMMANDS():
        cli.add_command(command)
