"""Training-free Bayesianization (TFB, arXiv 2412.05723): the widest noise on A that costs little on some data.

With the compact singular value decomposition B = U·diag(d)·Vᵀ the paper puts noise of standard deviation σ_q/d_i on row
i of Vᵀ·A. In the product B·A that is noise σ_q·U·E, with E standard normal: equally wide in all directions that B
reaches. One σ_q serves all layers.

An adapter file holds A itself and one σ for each of its weights, so that noise is put on the rows of A as they are.
There the rows of a column of noise have the precision BᵀB/σ_q², and σ_i = σ_q/‖b_i‖, b_i being column i of B, is its
diagonal. Of all independent noise it is the nearest, by KL(ours ‖ the paper's), and moves the product as far: the mean
square of what it adds to B·A is the paper's, rank·inputs·σ_q². Where the columns of B are orthogonal both are the same.
Marginal variances, σ_q²·(BᵀB)⁻¹_ii, would be the nearest by the other divergence, but add the more to the product the
more alike the columns are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import IVONError, param_ref
from ..reporter import Stage
from .problem import FitProblem, FittedSigma
from .state import Snapshot

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = 0.01  # nats
MOST = 12  # evaluations
_FIRST = 0.1  # σ_q at the start, as a share of the product's root mean square
_WIDEN = 4.0  # factor between widths until one costs too much
FARTHEST = _WIDEN**3  # of the first width, about six times the weights: nothing wider is tried
_FINE = 1.05  # factor between two widths that differ
_NEGLIGIBLE = 1e-6  # of the longest column of B: a shorter one has no noise, since nothing would show it


def noise_shape(model: PeftModel, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return σ at σ_q = 1 for the matrices A of LoRA layers, float32, by the names that `parameters` give them.

    Where a column of B is 0, or nearly 0, its row of A has no noise: it would change nothing.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    shape = {}
    for module in model.modules():
        for a, b, experts in _pairs(module):
            if a in names:
                shape[names[a]] = _rows_of_a(b.detach(), experts).view(-1, *[1] * (a.dim() - 1)).expand_as(a)
    return shape


def _pairs(module: Any) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
    """Return A and B of a LoRA layer's adapters, and how many experts they are of."""
    pairs: list[Any] = []
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        tables: Any = (getattr(module, first, None), getattr(module, second, None))
        if all(isinstance(table, (nn.ModuleDict, nn.ParameterDict)) for table in tables):
            for adapter in tables[0]:
                a, b = (getattr(table[adapter], "weight", table[adapter]) for table in tables)
                pairs.append((a, b, getattr(module, "num_experts", 1)))
    return pairs


def _rows_of_a(b: Tensor, experts: int) -> Tensor:
    """Return 1/‖b_i‖ for every row i of A, float32."""
    norms = b.float().transpose(0, 1).flatten(1).norm(dim=1)
    if experts > 1:  # PEFT has the experts' rows of A one after the other, and their columns of B taking turns
        norms = norms.view(-1, experts).T.flatten()
    return torch.where(norms > _NEGLIGIBLE * norms.max(), 1 / norms, 0)


def first_width(shape: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> float:
    """Return a σ_q to begin with: noise that is a tenth of A's root mean square in an average row."""
    ratios = [
        float(means[name].float().square().mean().sqrt() / values.square().mean().sqrt())
        for name, values in shape.items()
        if values.any()
    ]
    return _FIRST * sum(ratios) / len(ratios) if ratios else 0.0


def widest(cost: Callable[[float], float], start: float, most: int) -> tuple[float, list[tuple[float, float]]]:
    """Return the largest width whose `cost` is at most 0, by bisection of its logarithm, and all that was tried.

    The cost is assumed to rise with the width, from below 0. Starting with `start`, the width changes by factors of
    four until there are costs on both sides of 0; it does not exceed `FARTHEST` times `start`. The result is 0 where
    every width costs too much, and the largest width where none does.
    """
    tried: list[tuple[float, float]] = []
    low, high, width = 0.0, float("inf"), start
    while len(tried) < most:
        tried.append((width, cost(width)))
        if tried[-1][1] <= 0:
            low = width
        else:
            high = width
        if (low and high <= low * _FINE) or low >= FARTHEST * start:
            break
        width = low * _WIDEN if high == float("inf") else high / _WIDEN if not low else (low * high) ** 0.5
    return low, tried


def fit(problem: FitProblem) -> FittedSigma:
    """Return the widest σ whose averaged draws have an NLL on the held-out data within the tolerance of the mean's."""
    settings, reporter, held_out = problem.settings, problem.reporter, problem.held_out
    assert held_out is not None
    tolerance = TOLERANCE if settings.tolerance is None else settings.tolerance
    shape = noise_shape(problem.session.model, problem.parameters)
    start = first_width(shape, {name: problem.parameters[name].detach() for name in shape})
    if not start:
        raise IVONError(
            f"{problem.adapter.folder} has no LoRA matrices with weights other than 0; {param_ref('method')} tfb is "
            "for LoRA: use fisher"
        )
    unit = problem.posterior(FittedSigma(shape))
    kept = problem.state.read()
    known: dict[str, float] = dict(kept.values["nll"]) if kept else {}
    stage = Stage(reporter, "finding the width", (1 + (MOST - 1) * settings.samples) * len(held_out.items))

    def nll(width: float) -> float:
        if (name := repr(width)) not in known:
            known[name] = problem.nll(unit, width**-2 if width else math.inf, stage)
            problem.state.write(Snapshot({}, {"nll": known}))
        return known[name]

    mean = nll(0.0)
    width, tried = widest(lambda width: nll(width) - mean - tolerance, start, MOST - 1)
    for each, cost in tried:
        rise = cost + tolerance
        reporter.say(f"σ_q = {each:.4g}: NLL {mean + rise:.4f}, {rise:+.4f} of {tolerance:g}")
    if not width:
        raise IVONError(
            f"{param_ref('tolerance')} {tolerance:g}: every width that was tried raises the NLL by more; allow more"
        )
    if width >= FARTHEST * start:
        reporter.notify(
            "noise six times as large as the weights does not raise the NLL by as much; nothing wider was tried: "
            "do the data depend on the adapter?"
        )
    header = {
        "tfb_sigma_q": repr(width),
        "tfb_tolerance": str(tolerance),
        "tfb_anchor": ", ".join(Path(path).name for path in held_out.paths),
        "tfb_nll_mean": f"{mean:.6g}",
        "tfb_nll": f"{known[repr(width)]:.6g}",
        "tfb_evaluations": str(len(known)),
    }
    return FittedSigma({name: value * width for name, value in shape.items()}, header)
