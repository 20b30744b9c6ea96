"""Draws from a posterior in a loaded PEFT model: one after the other, in one batch, or averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import IVONError, param_ref
from ..metrics.scores import entropy

if TYPE_CHECKING:
    from peft import PeftModel

    from ..posterior.posterior import Posterior


class AdapterSlots:
    """The tensors of one adapter inside a PEFT model, under the keys by which PEFT saves them.

    Attributes:
        places: the live parameters (and buffers of `modules_to_save`), by PEFT's key.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        from peft import get_peft_model_state_dict

        self._model = model
        # Not state_dict(): quantized layers pack and copy there, and these must be the parameters themselves.
        live: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        live |= dict(model.named_buffers(remove_duplicate=False))
        self.places = get_peft_model_state_dict(model, live, adapter_name, save_embedding_layers=False)
        self._all = dict(self.places)
        if hasattr(model, "get_input_embeddings"):
            # PEFT saves the embeddings too when they are targeted or were resized: an adapter may have them.
            self._all |= get_peft_model_state_dict(model, live, adapter_name, save_embedding_layers=True)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise IVONError unless `tensors` are the adapter's: every key, no other key, the same shapes."""
        fix = f"name the base model that the adapter was trained on with {param_ref('base_model')}"
        for key, tensor in tensors.items():
            if key not in self._all:
                raise IVONError(f"the base model does not fit the adapter: it has no place for {key}; {fix}")
            if self._all[key].shape != tensor.shape:
                raise IVONError(
                    f"the base model does not fit the adapter: {key} is {list(tensor.shape)} in the adapter and "
                    f"{list(self._all[key].shape)} in the model; {fix}"
                )
        for key in self.places:
            if key not in tensors:
                raise IVONError(f"the base model does not fit the adapter: the adapter has no {key}; {fix}")

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the model, each cast to its parameter's dtype."""
        for key, tensor in tensors.items():
            self._all[key].copy_(tensor)

    @contextlib.contextmanager
    def loaded(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold `tensors` in the model inside the block; afterwards, whatever happened, what was there."""
        before = {key: self._all[key].detach().clone() for key in tensors}
        try:
            self.write(tensors)
            yield
        finally:
            self.write(before)

    def drawn(self, draws: Sequence[Mapping[str, Tensor]]) -> Callable[[], AbstractContextManager[None]]:
        """Return blocks inside which one draw runs, of any kind, or several in one batch as `Stack` does."""
        return partial(self.loaded, draws[0]) if len(draws) == 1 else Stack(self._model, draws).running

    def without(self) -> AbstractContextManager[None]:
        """Run the base model inside the block."""
        return self._model.disable_adapter()


@contextlib.contextmanager
def draws(posterior: Posterior, model: PeftModel, n: int = 10, seed: int = 0) -> Iterator[Iterator[int]]:
    """Put draws into a loaded model: `with draws(q, model, n) as members: for k in members: model(…)`.

    In the loop `model` holds the draw that `posterior.sample(seed, k)` returns. After the block, also after an
    exception, it holds what it held before. A draw costs one copy of the adapter's weights; nothing is reloaded, and
    the model's mode and `requires_grad` stay.

    Raises:
        IVONError: `n` is not positive, the model is no PeftModel with its adapter active and unmerged, or it does not
            fit the posterior.
    """
    if n < 1:
        raise IVONError(f"{param_ref('n')} {n} is not a number of draws; 10 is usual")
    _check_active(model)
    slots = AdapterSlots(model)
    slots.check(posterior.mean)

    def members() -> Iterator[int]:
        for member in range(n):
            slots.write(posterior.draw(seed, member))
            yield member

    with slots.loaded(posterior.mean):
        yield members()


def _check_active(model: PeftModel) -> None:
    """Refuse a model whose forward pass does not read the adapter that draws are written into."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise IVONError(f"the model, a {type(model).__name__}, is no PeftModel; load the adapter into it")
    active = model.active_adapters
    if active != ["default"]:
        raise IVONError(
            f"the model's active adapter is {', '.join(active)}, and draws go into the one that PEFT calls default: "
            "load the adapter without a name, and set_adapter('default')"
        )
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules()):
        raise IVONError("the model's adapter is merged into it; call unmerge_adapter() first")


class Prediction(NamedTuple):
    """What a posterior predicts, float32 on the model's device.

    Attributes:
        probabilities: p(y|x), the average over draws, of the shape that the model's logits have: [batch, classes], or
            [batch, tokens, vocabulary].
        disagreement: the mutual information of prediction and draw, in nats, without the last dimension: the entropy
            of the average less the average of the entropies. 0 where all draws predict the same.
    """

    probabilities: Tensor
    disagreement: Tensor


def predict_logits(
    posterior: Posterior, model: PeftModel, batch: Mapping[str, Any], n: int = 10, seed: int = 0
) -> Prediction:
    """Return the average prediction of n draws, E_q[p(y|x, θ)] (arXiv 2506.14280, section 4.1), and their disagreement.

    The model predicts in evaluation mode, without gradients, and is left as it was.

    Args:
        model: a PeftModel over the base model.
        batch: what its `forward` takes: `input_ids`, `attention_mask`, …; tensors go to the model's device, `labels`
            are left out.
        n, seed: the draws are `posterior.sample(seed, 0)` to `posterior.sample(seed, n − 1)`.

    Raises:
        IVONError: as `draws` does, or the model gives no logits.
    """
    inputs = {
        key: value.to(model.device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    mean, entropies = torch.zeros(()), torch.zeros(())
    with evaluating(model), draws(posterior, model, n, seed) as members:
        for k in members:
            logits = getattr(model(**inputs), "logits", None)
            if logits is None:
                raise IVONError(f"a {type(model.get_base_model()).__name__} gives no logits to predict with")
            probabilities = logits.float().softmax(-1)
            mean = mean + (probabilities - mean) / (k + 1)
            entropies = entropies + (entropy(probabilities) - entropies) / (k + 1)
    return Prediction(mean, (entropy(mean) - entropies).clamp_(min=0))


class Stack:
    """Several draws over one model's base weights, to run any neighbouring ones of them in one batch.

    It holds the draws once more, in the model's dtype and on its device.

    Raises:
        IVONError: the adapter is more than plain LoRA on linear layers (DoRA, embeddings, saved modules,
            biases, experts).
    """

    def __init__(self, model: PeftModel, draws: Sequence[Mapping[str, Tensor]]) -> None:
        from peft.tuners.lora import LoraLayer

        adapter_name = "default"  # as PEFT calls the first
        self._layers: list[tuple[Any, Tensor, Tensor]] = []
        used: set[str] = set()
        for name, module in model.named_modules():
            keys = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
            plain = isinstance(module, LoraLayer) and adapter_name not in module.lora_variant
            # A layer that adapts a tensor of a module (`target_parameters`: fused experts) has no product to stack.
            if plain and keys[0] in draws[0] and not hasattr(module, "parameter_name"):
                weight: Any = module.lora_A[adapter_name].weight
                a, b = (torch.stack([draw[key] for draw in draws]).to(weight) for key in keys)
                if a.dim() == 3:  # LoRA on a convolution has more
                    self._layers.append((module, a.transpose(1, 2), b.transpose(1, 2) * module.scaling[adapter_name]))
                    used.update(keys)
        if left := draws[0].keys() - used:
            raise IVONError(
                f"{param_ref('draws_per_pass')} {len(draws)}: {sorted(left)[0]} is not plain LoRA on a linear layer; "
                f"use {param_ref('draws_per_pass')} 1"
            )

    @contextlib.contextmanager
    def running(self, which: slice = slice(None)) -> Iterator[None]:
        """Run the k draws of `which` at once inside the block: of k·b input rows, rows i·b to (i+1)·b see its i-th.

        The base layers see all rows as one batch; each LoRA layer multiplies the rows by their own A and B, two
        batched products whatever k is.
        """
        with contextlib.ExitStack() as stack:
            for module, a, b in self._layers:
                stack.enter_context(_stacked(module, a[which], b[which]))
            yield


@contextlib.contextmanager
def _stacked(module: Any, a: Tensor, b: Tensor) -> Iterator[None]:
    """Replace the forward pass of a LoRA layer by one of all draws, whose A and B are stacked, inside the block."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = module.base_layer(x, *args, **kwargs)
        rows = x.to(a.dtype).reshape(len(a), -1, x.shape[-1])
        return result + (rows @ a @ b).reshape(result.shape).to(result.dtype)

    hooked = module.__dict__.get("forward")  # accelerate's hooks put one on the instance
    module.forward = forward
    try:
        yield
    finally:
        if hooked is None:
            del module.forward
        else:
            module.forward = hooked


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients inside the block, and back as it was afterwards.

    Each module gets its own mode back, and each parameter its `requires_grad`, which PEFT's `disable_adapter` changes.
    """
    training = [module for module in model.modules() if module.training]
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a module caches meanwhile must serve training later
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, wanted in gradients.items():
            parameter.requires_grad_(wanted)
