"""What ships for training, registered through the hooks that a third party would use."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


@hookimpl
def create_optimizer(
    named_parameters: list[tuple[str, torch.nn.Parameter]], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    from ..optim.ivon import IVONLoRA

    return IVONLoRA(named_parameters, **settings)


@hookimpl
def sampling_context(trainer: Trainer, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    return optimizer.sampled_params()  # type: ignore[attr-defined]


@hookimpl
def log_metrics(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return optimizer.summary()  # type: ignore[attr-defined]
