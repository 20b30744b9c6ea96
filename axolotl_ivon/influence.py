"""What each training example has done to the mean: the Memory-Perturbation Equation (arXiv 2310.19273) for our posterior.

One gradient of each example's loss, at the mean m, tells what leaving the example out would do, without retraining.
The objective is λ·(mean loss of N examples) + KL, so an example's loss ℓᵢ has the weight λ/N in it, and without it

    m₋ᵢ ≈ m + (λ/N)·σ²·∇ℓᵢ(m)

to first order; docs/influence.md derives it, and says where it is exact. Gradients meet σ² as the backward pass hands them
over, a parameter at a time, and leave two numbers an example.

Importing this module imports no torch: what a user got wrong is told at once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .data.chats import Example, read_examples, read_lines
from .data.encode import Item, check_tokens, encode, encode_turns
from .errors import IVONError, parameter
from .models.load import load_model, load_tokenizer
from .posterior.posterior import Posterior
from .storage.atomic import new_file
from .storage.format import find_base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from .models.gradients import ExampleGradients

_T = TypeVar("_T")
SCORES = ("loss", "leverage", "sensitivity", "on")


class Products(NamedTuple):
    """What examples' gradients g of their losses leave behind, each float64 [k].

    Attributes:
        losses: the examples' losses.
        own: Σ σ²·g².
        along: Σ σ²·g·(a direction), or None without one.
    """

    losses: Tensor
    own: Tensor
    along: Tensor | None


def products(
    gradients: ExampleGradients[_T],
    examples: Sequence[_T],
    variance: Mapping[str, Tensor],
    direction: Mapping[str, Tensor] | None = None,
) -> Products:
    """Run one backward pass over `examples`, and meet each one's gradient with σ² and with σ²·`direction`.

    Args:
        variance: σ² by parameter, float32 of its shape; what is not in it does not move.
        direction: a gradient by parameter, likewise.
    """
    import torch

    device = next(iter(variance.values())).device
    own = torch.zeros(len(examples), device=device)
    along = torch.zeros(len(examples), device=device)

    def consume(name: str, first: int, some: Tensor) -> None:
        if name not in variance:
            return
        part, flat = slice(first, first + len(some)), some.flatten(1)
        scaled = variance[name].flatten()
        if direction is not None and name in direction:
            along[part] += flat @ (scaled * direction[name].flatten())
        own[part] += flat.square_() @ scaled

    losses = gradients(examples, consume)
    return Products(losses.cpu().double(), own.cpu().double(), None if direction is None else along.cpu().double())


def answer_losses(model: PeftModel, items: Sequence[Item]) -> Tensor:
    """Return the negative log-likelihood of each example, float32 [examples], in nats, summed over what is scored.

    It is softplus(−log-odds) of every scored class, so that a loss of 1e-6, and its gradient, have all their digits:
    `softmax − 1` has none there.
    """
    import torch.nn.functional as F

    from .models.gradients import label_logits

    found = label_logits(model, items)
    target = found.targets[:, None]
    others = found.logits - found.logits.gather(1, target)
    losses = F.softplus(others.scatter(1, target, -math.inf).logsumexp(1))
    return losses.new_zeros(len(items)).index_add(0, found.row, losses)


def log_odds_variance(losses: Tensor, own: Tensor) -> Tensor:
    """Return the variance under σ of log(p/(1 − p)), to first order, p = exp(−loss) being what the answers have.

    Its gradient is −∇ℓ/(1 − p). Of two classes it is the same whichever is right: the variance of the logit.
    """
    import torch

    return own / torch.expm1(-losses).square().clamp_min(sys.float_info.min)
