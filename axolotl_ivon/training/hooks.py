"""What ships for training, registered through the hooks that a third party would use."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ..hookspecs import hookimpl


@hookimpl
def create_optimizer(named_parameters: Any, settings: Mapping[str, Any]) -> Any:
    from ..optim.ivon import IVONLoRA

    return IVONLoRA(named_parameters, **settings)


@hookimpl
def sampling_context(trainer: Any, optimizer: Any) -> AbstractContextManager[None]:
    return optimizer.sampled_params()


@hookimpl
def log_metrics(trainer: Any, optimizer: Any) -> dict[str, float]:
    return optimizer.summary()
