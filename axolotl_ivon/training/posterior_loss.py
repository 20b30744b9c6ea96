"""The evaluation loss of the posterior while it is being trained: one prediction, averaged over draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..errors import IVONError, param_ref
from ..optim.ivon import IVONLoRA


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode; training goes on with the random numbers that it would have had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a DataLoader takes a random number at every pass
            yield
    finally:
        for module in training:  # a part may have been frozen in its evaluation mode
            module.training = True


def predicts_next_token(model: Any) -> bool:
    """Return whether the logits at a place are of the token after it; of others they are of the label there."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return not (encodes or type(base).__name__.endswith(("ForTokenClassification", "ForMaskedLM")))


def posterior_loss(trainer: Trainer, optimizer: IVONLoRA, dataloader: Iterable[Any], samples: int) -> float:
    """Return the negative log-likelihood of the labels under the predictive distribution averaged over draws.

    Per label l with input x it is −log(1/K·Σ_k p(l | x, θ_k)), θ_k ~ q, averaged over all labels: tokens of a causal
    LM, or classes. The draws are the same at every evaluation. It makes K passes over the data, and keeps one number
    for every label. The model is left with its mean, and the random numbers of the run as they were.

    Raises:
        IVONError: the data has no labels for the model's logits.
    """
    total = torch.tensor(-math.inf)
    with evaluating(trainer.model):
        for number in range(samples):
            with optimizer.evaluation_draw(number):
                drawn = torch.cat([_label_log_probabilities(trainer, batch) for batch in dataloader])
            total = torch.logaddexp(total, drawn)
    log_likelihood = total - math.log(samples)
    sums = torch.stack([log_likelihood.sum(dtype=torch.float64), torch.tensor(float(len(log_likelihood)))])
    sums = trainer.accelerator.reduce(sums.to(trainer.accelerator.device, torch.float32), "sum")
    return float(-sums[0] / sums[1])


def _label_log_probabilities(trainer: Trainer, batch: Any) -> Tensor:
    """Return log p of every label of a batch, float32 on the CPU, shape [labels]."""
    inputs = trainer._prepare_inputs(batch)
    model: Any = trainer.model
    labels = inputs.get("labels")
    if labels is None:
        raise IVONError(f"{param_ref('eval_samples')} needs data with `labels`; set it to 0")
    if labels.is_floating_point():
        raise IVONError(
            f"{param_ref('eval_samples')} needs `labels` that are classes or tokens, not numbers; set it to 0"
        )
    shifted = labels.dim() == 2 and predicts_next_token(model)
    if shifted or labels.dim() == 1:  # an encoder-decoder makes its inputs of them
        del inputs["labels"]
    with trainer.compute_loss_context_manager():
        logits = model(**inputs).logits
    if logits.shape[: labels.dim()] != labels.shape:
        raise IVONError(f"{param_ref('eval_samples')} needs `labels` that fit the model's logits; set it to 0")
    if shifted:
        labels, logits = labels[:, 1:], logits[:, :-1]
    chosen = labels != -100
    return -torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none").cpu()
