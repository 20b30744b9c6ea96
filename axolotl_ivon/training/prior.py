"""An earlier posterior as the prior of a run: whether it fits the adapter, and its tensors by the model's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..errors import IVONError, param_ref
from ..posterior.chain import check_prior, check_width, kinds
from ..posterior.posterior import Posterior


def keys_in_file(model: PeftModel, names: Iterable[str]) -> dict[str, str]:
    """Return which tensor of an adapter's file each of these parameters is; those that are in none are left out."""
    names = list(names)
    marks = {name: torch.full((), float(i)) for i, name in enumerate(names)}
    state = {name: marks.get(name, torch.full((), -1.0)) for name, _ in model.named_parameters()}
    keys: dict[str, str] = {}
    for adapter in model.peft_config:
        kept = get_peft_model_state_dict(model, dict(state), adapter_name=adapter, save_embedding_layers=False)
        keys |= {names[int(mark)]: key for key, mark in kept.items() if int(mark) >= 0}
    return keys


def gaussian_prior(
    model: PeftModel, shapes: Mapping[str, torch.Size], prior: Posterior
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (m₀, σ₀) of every trained parameter, float32, by its name in the model; `shapes` are theirs.

    Raises:
        IVONError: it is of another base model, has another rank, scaling or other targets, or no width; the message
            says which.
    """
    named = f"{param_ref('prior')}: {prior.folder or 'the posterior'}"
    [config, *others] = (config.to_dict() for config in model.peft_config.values())
    if others:
        raise IVONError(f"{named} is for one adapter, and the model has {len(others) + 1}: load one")
    bases = [PurePath(str(x.get("base_model_name_or_path"))).name for x in (prior.config, config)]
    if bases[0] != bases[1] and "None" not in bases:
        raise IVONError(f"{named} is over {bases[0]} and this adapter over {bases[1]}; give a posterior over that")
    if prior.folder is not None:
        check_prior(str(prior.folder), config)
    check_width(named, prior.metadata)
    keys = keys_in_file(model, shapes)
    trained, held = set(keys.values()), {key for key in prior.mean if prior.sigma.raw(key).any()}
    if trained != held:
        modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in shapes}
        own, other = kinds(prior.mean), ", ".join(sorted(modules))
        both = f"{named} is on {own} and this adapter on {other}"
        if own == other:
            both = f"{named} and this adapter differ in {min(trained ^ held)}"
        raise IVONError(f"{both}; set lora_target_modules and the layers as they were")
    tensors = {}
    for name, key in keys.items():
        mean, sigma = torch.from_numpy(prior.mean.float32(key)), torch.from_numpy(prior.sigma.raw(key))
        if mean.shape != shapes[name]:
            raise IVONError(f"{named} has shape {list(mean.shape)} in {key} and this adapter {list(shapes[name])}")
        if not (sigma > 0).all():
            raise IVONError(f"{named} has weights with σ = 0 in {key}, which would never move; give it unpruned")
        tensors[name] = (mean, sigma)
    return tensors
