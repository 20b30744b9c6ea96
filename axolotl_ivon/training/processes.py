"""Average and agree on gradients over processes, and refuse sharding that IVON cannot train with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer

from ..errors import IVONError, param_ref


def is_sharded(trainer: Trainer) -> bool:
    """Return whether DeepSpeed or FSDP takes the model over."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def _are_several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def average(tensors: Sequence[Tensor]) -> None:
    """Put the means over the processes into tensors that are alike in number and shape everywhere, in place."""
    if tensors and _are_several():
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_over_processes(value: float, device: torch.device) -> float:
    """Return the sum of a number over the processes."""
    if not _are_several():
        return value
    total = torch.tensor(float(value), device=device)
    dist.all_reduce(total)
    return float(total)


def agree_on_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Let every process have a gradient, zero if need be, where any of them has one, and return these gradients."""
    if _are_several():
        present = torch.tensor([float(param.grad is not None) for param in params], device=params[0].device)
        dist.all_reduce(present)
        for param, count in zip(params, present.tolist(), strict=True):
            if count and param.grad is None:
                param.grad = torch.zeros_like(param)
    return [param.grad for param in params if param.grad is not None]


def check_sharding(trainer: Trainer) -> None:
    """Raise an IVONError for settings of several processes that would train something else than the user asked for."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name, key in (("tp_size", "tensor_parallel_size"), ("cp_size", "context_parallel_size")):
        if (size := getattr(parallelism, name, 1) or 1) > 1:
            raise IVONError(f"{key}: {size} splits the adapter or a sequence over processes, which IVON cannot do yet")
    if not is_sharded(trainer):
        return
    if trainer.is_deepspeed_enabled and "optimizer" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config:
        raise IVONError("the DeepSpeed config has an optimizer, which would take IVON's place; remove it from there")
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise IVONError("FSDP 1 flattens the adapter into the base model; set fsdp_version: 2")
    if trainer.args.fp16:
        raise IVONError("fp16 with DeepSpeed or FSDP scales the loss out of IVON's sight; set bf16: true instead")
    if trainer.args.max_grad_norm:
        raise IVONError(
            f"max_grad_norm: {trainer.args.max_grad_norm:g} has no effect on the adapter under DeepSpeed or FSDP; "
            f"remove it: {param_ref('clip')} bounds the step"
        )
