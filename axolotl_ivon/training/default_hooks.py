"""The optimizer, sampling and metrics of a run unless a third party's hooks say otherwise."""

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
