"""The posterior of a training loop of one's own, without a Trainer, saved as an adapter with its σ."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel

from ..errors import IVONError
from ..optim.ivon import IVONLoRA
from ..posterior.chain import prior_header
from ..posterior.posterior import Posterior
from .callback import trained_parameters
from .checkpoints import save_adapters, save_optimizer_s_sigma
from .saved import check_that_all_is_saved, names_of, trained_adapters


def save_posterior(
    model: PeftModel,
    optimizer: IVONLoRA,
    folder: str | os.PathLike[str],
    *,
    train_size: int | None = None,
    prior: Posterior | None = None,
) -> None:
    """Save a PEFT model's adapter and beside it the σ of its optimizer, for `Posterior.from_pretrained` to read.

    It is for training loops without a Trainer: after `attach`, `model.save_pretrained` does it by itself.

    Args:
        model: the PEFT model whose trained weights are the parameters of `optimizer`.
        optimizer: outside of `sampled_params()`, so that the model holds the mean.
        folder: where the adapter goes. Mean and σ take their places together; what else is there stays.
        train_size: N, the number of training examples, for the header; commands that need it say so.
        prior: the posterior that gave m₀ and σ₀ to the optimizer, if one did: the header then keeps the chain.

    Raises:
        IVONError: a draw is in the parameters, a weight is trained by another optimizer or is no part of the adapter,
            or a file cannot be written.
    """
    if optimizer.sampling:
        raise IVONError("save_posterior() was called inside sampled_params(), at a draw; call it after the context")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    params = trained_parameters(model)
    if others := [name for name, param in params.items() if id(param) not in held]:
        raise IVONError(f"{others[0]} is trained and this optimizer does not have it: freeze it, or give it the weight")
    names = names_of(model, params)
    check_that_all_is_saved(model, names)
    size = "" if train_size is None else str(train_size)
    header = {"preset": "", "gamma": "", "train_size": size}
    if prior is not None:
        header |= prior_header(prior, optimizer.param_groups[0]["prior_strength"], size)
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)

    def save_sigma_of(place: Path, adapter: str) -> None:
        save_optimizer_s_sigma(model, names, params, optimizer, place, adapter, header, steps)

    adapters = trained_adapters(model, names)
    save_adapters(Path(folder), adapters, lambda new: model.save_pretrained(str(new)), save_sigma_of)
