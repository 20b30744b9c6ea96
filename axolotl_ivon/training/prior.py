"""An earlier posterior as the prior of a run: whether it fits the adapter, and its tensors by the model's names."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..errors import IVONError, param_ref
from ..posterior.adapter import modules
from ..posterior.chain import check_prior
from ..posterior.findings import begins_at_zero
from ..posterior.posterior import Posterior
from .saved import trained_adapters, weights_in_file
from .sharded import gathered

LOG = logging.getLogger(__name__)


def gaussian_prior(
    model: PeftModel, names: Mapping[str, str], shapes: Mapping[str, torch.Size], prior: Posterior
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (m₀, σ₀) of every trained parameter, float32, by its name in the model, as `names` and `shapes` have it.

    Raises:
        IVONError: it is of another base model, has another rank, scaling or other targets, or no width; the message
            says which.
    """
    named = f"{param_ref('prior')}: {prior.folder or 'the posterior'}"
    [adapter, *others] = trained_adapters(model, names)
    if others:
        raise IVONError(f"{named} is for one adapter, and {len(others) + 1} of the model are trained: train one")
    config = model.peft_config[adapter].to_dict()
    check_prior(prior, config)
    keys = weights_in_file(model, adapter, names)
    trained, held = set(keys), {key for key in prior.mean if prior.sigma.raw(key).any()}
    if trained != held:
        own = ", ".join(sorted({name.rpartition(".")[2] for name in modules(prior.mean)}))
        other = ", ".join(sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in shapes}))
        both = f"{named} is on {own} and this adapter on {other}"
        if own == other:
            both = f"{named} and this adapter differ in {min(trained ^ held)}"
        raise IVONError(f"{both}; set lora_target_modules and the layers as they were")
    tensors = {}
    for key, name in keys.items():
        mean, sigma = prior.mean[key].float(), prior.sigma[key]
        if mean.shape != shapes[name]:
            raise IVONError(f"{named} has shape {list(mean.shape)} in {key} and this adapter {list(shapes[name])}")
        if not (sigma > 0).all():
            raise IVONError(f"{named} has weights with σ = 0 in {key}, which would never move; give it unpruned")
        tensors[name] = (mean, sigma)
    return tensors


@torch.no_grad()
def start_at(prior: Mapping[str, tuple[Tensor, Tensor]], model: PeftModel, params: Mapping[str, nn.Parameter]) -> None:
    """Put the prior's means into the weights of a new adapter; one that was trained keeps its own."""
    zero = all(
        getattr(config, "init_lora_weights", True) in (True, "gaussian", "eva") for config in model.peft_config.values()
    )
    with gathered(list(params.values()), written=True):
        # Under FSDP2 the first process alone has weights at this time.
        means = {name: prior[name][0].to(p.device, p.dtype) for name, p in params.items() if not p.is_meta}
        trained = zero and any(begins_at_zero(name) and bool(params[name].any()) for name in means)
        if trained and not all(torch.equal(params[name], mean) for name, mean in means.items()):
            LOG.info("the adapter in the model was trained already: training goes on from its weights, not the prior's")
            return
        for name, mean in means.items():
            params[name].copy_(mean)
