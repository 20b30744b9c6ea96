"""A softmax temperature built into a model's weights, so that every runtime predicts with it."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import IVONError, param_ref
from .draws import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest error of the scaled logits, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def build_in_temperature(model: PreTrainedModel, temperature: float) -> str:
    """Divide the logits of a model by T, in place, and return the name of the module that was scaled.

    That is the output layer, or the norm before it where the output layer shares its weights with the embeddings. The
    probabilities are softmax(logits/T) afterwards (arXiv 1706.04599), up to the rounding of the model's dtype. A cap of
    the logits (`final_logit_softcapping` of Gemma) is divided by T as well, which keeps this exact.

    Args:
        model: a causal language model or a sequence classifier on the CPU, not quantized, without an adapter.
        temperature: T, positive and finite.

    Raises:
        IVONError: the model has no such place; it is then as it was.
    """
    if not (0 < temperature < math.inf):
        raise IVONError(f"a softmax temperature of {temperature} is not a positive number")
    names = {module: name for name, module in model.named_modules()}
    with evaluating(model):
        before, order = _logits(model)
        head = model.get_output_embeddings() or next((m for m in reversed(order) if isinstance(m, nn.Linear)), None)
        place = f"{type(model).__name__} has no place for a softmax temperature of {temperature:.3g}"
        without = f"merge without it ({param_ref('no_recommended')})"
        advice = f"{without}, and divide the logits by {temperature:.3g} where you predict"
        if head is None or head not in order:
            raise IVONError(f"{place} (no output layer); {advice}")
        embeddings = model.get_input_embeddings()
        tied = embeddings is not None and getattr(embeddings, "weight", None) is head.weight
        earlier = order[: order.index(head)]
        module = next((m for m in reversed(earlier) if _is_norm(m)), None) if tied else head
        offset = _offset(module, temperature) if module is not None and tied else 0.0
        if module is None or offset is None:
            raise IVONError(f"{place} (its output layer is its embeddings, and no norm stands before it); {advice}")
        saved = {name: value.clone() for name, value in module.named_parameters()}
        cap = getattr(model.config, "final_logit_softcapping", None)
        _scale(module, temperature, offset)
        if cap is not None:
            model.config.final_logit_softcapping = cap / temperature
        error = (_logits(model)[0] * temperature - before).abs().max() / before.abs().max()
        if not error < _TOLERANCE.get(model.dtype, 1e-3):
            for name, value in module.named_parameters():
                value.copy_(saved[name])
            if cap is not None:
                model.config.final_logit_softcapping = cap
            raise IVONError(f"{place} (its logits are no function of {names[module]} that scales); {advice}")
    return names[module]


def _logits(model: nn.Module) -> tuple[Tensor, list[nn.Module]]:
    """Return the logits of a few tokens, float32, and the innermost modules in the order in which they ran."""
    order: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: order.append(module))
        for module in model.modules()
        if not any(module.children())
    ]
    config: Any = model.config
    try:
        ids = torch.arange(1, 9).remainder(config.get_text_config().vocab_size)[None]
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float(), order
    finally:
        for hook in hooks:
            hook.remove()


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _scale(module: nn.Module, temperature: float, offset: float) -> None:
    for name, value in module.named_parameters():
        added = offset if name == "weight" else 0.0
        value.copy_((value.double() + added) / temperature - added)


def _offset(norm: nn.Module, temperature: float) -> float | None:
    """Return what a norm adds to its weight (Gemma's adds 1), or None if scaling it does not scale what it gives."""
    plain = copy.deepcopy(norm).float()
    weight: Any = plain.weight
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    wanted = plain(x) / temperature
    for offset in (0.0, 1.0):
        scaled = copy.deepcopy(plain)
        _scale(scaled, temperature, offset)
        if torch.allclose(scaled(x), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            return offset
    return None
