"""Where PEFT saves the weights that are trained: the folder of their adapter, their names in its file, and their σ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..errors import IVONError
from ..posterior.posterior import Posterior
from ..storage.format import SIGMA_FILE


def names_of(model: PeftModel, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Return every name that these parameters have in the model, and the one in `params`: tied modules share one."""
    first = {id(param): name for name, param in params.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in named if id(param) in first}


def weights_in_file(model: PeftModel, adapter: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return which trained weight each tensor of an adapter's file is, by its key there; others are left out.

    `names` are those of `names_of`; a weight that modules share is in the file once for each.

    Raises:
        IVONError: PEFT saves something else than the weights of this kind of adapter.
    """
    weights = list(dict.fromkeys(names.values()))
    marks = {weight: torch.full((), float(i)) for i, weight in enumerate(weights)}
    here = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    # Under DeepSpeed and FSDP2 the trained weights are no parameters of the model any more.
    state = {name: torch.full((), -1.0) for name, _ in here} | {name: marks[weight] for name, weight in names.items()}
    try:
        kept = get_peft_model_state_dict(model, state, adapter_name=adapter, save_embedding_layers=False)
        return {key: weights[int(mark)] for key, mark in kept.items() if int(mark) >= 0}
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        kind = getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type)
        raise IVONError(
            f"the adapter is of type {kind}, which PEFT does not save weight by weight, so there is no σ for it: train "
            "a LoRA adapter"
        ) from error


def trained_adapters(model: PeftModel, names: Mapping[str, str]) -> list[str]:
    """Return the adapters with a trained weight; TRL, for one, adds a frozen copy as the reference of DPO."""
    return [adapter for adapter in model.peft_config if weights_in_file(model, adapter, names)]


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Return where PEFT saves an adapter in the folder of its model."""
    return folder if adapter == "default" else folder / adapter


def check_that_all_is_saved(model: PeftModel, names: Mapping[str, str]) -> None:
    """Refuse to train what no adapter file holds: its σ would be lost with its mean."""
    if not names:
        raise IVONError("the model has no trainable parameter: the adapter is frozen (is_trainable=False?)")
    kept = {weight for adapter in model.peft_config for weight in weights_in_file(model, adapter, names).values()}
    for name in names.values():
        if name not in kept:
            raise IVONError(
                f"{name} is trained but is not part of the adapter: freeze it, or add its module to "
                "lora_target_modules or lora_modules_to_save"
            )


def sigma_of_checkpoint(
    checkpoint: Path, adapters: Iterable[str]
) -> dict[str, tuple[dict[str, Tensor], Mapping[str, str]]]:
    """Return σ and its header in a checkpoint, by adapter that has one; nothing is left to be read later."""
    posteriors: dict[str, tuple[dict[str, Tensor], Mapping[str, str]]] = {}
    for adapter in adapters:
        folder = adapter_folder(checkpoint, adapter)
        if (folder / SIGMA_FILE).is_file():
            saved = Posterior.from_pretrained(folder)
            posteriors[adapter] = {key: tensor.clone() for key, tensor in saved.sigma.items()}, saved.metadata
    return posteriors
