"""From the information of the data to σ: the prior's part, and λ by validation data.

The posterior is q = N(m, diag(σ²)) with σ² = 1/(λ·p), p = h + δ, as in training: h is the Fisher information of one
loss, δ the prior's part. For the empirical prior δ = κ/(λ·mean(m² + σ²)) by tensor (arXiv 2506.14280, Eq. 2; the
KL-optimal one at κ = 1), at the fixed point that it has with σ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..optim.kernels.base import PRECISION_CEILING, PRECISION_FLOOR
from ..reporter import Stage
from ..settings.presets import PRESETS
from .problem import FitProblem, FittedSigma

# λ that the validation data choose from, as multiples of the one that N gives.
FACTORS = tuple(4.0**k for k in range(-3, 4))


class Prior(NamedTuple):
    """λ and the prior, as `IVONLoRA` has them."""

    ess: float  # effective sample size λ
    kind: Literal["empirical"] | float = "empirical"  # or δ of a fixed prior
    strength: float = 1.0  # κ, a factor on δ

    def delta(self, information: Tensor, mean: Tensor) -> float:
        """Return δ of one tensor, from h and m of the same shape.

        The empirical one is the root of κ = λ·mean(m²)·δ + mean(δ/(h + δ)), which rises with δ. Weights on which no
        example depends (h = 0: a token that does not occur, say) have the prior as their posterior, whatever it is, so
        they do not count in it, unless nothing depends on any of them. Where m is 0 all over and κ ≥ 1 there is no
        root: the KL-optimal prior is a point.
        """
        if self.kind != "empirical":
            return self.strength * self.kind
        informed = information > 0
        known = bool(informed.any())
        h = information[informed].double()
        pull = self.ess * float((mean[informed] if known else mean).double().square().mean())
        bounds = [self.strength / pull] if pull else []
        if not known:
            return bounds[0] if bounds else PRECISION_CEILING
        if self.strength < 1:
            bounds.append(self.strength / (1 - self.strength) * float(h.max()))
        if not bounds:
            return PRECISION_CEILING
        from scipy.optimize import brentq

        def excess(delta: float) -> float:
            return pull * delta + float((delta / (h + delta)).mean()) - self.strength

        highest = min(bounds)
        return brentq(excess, 0.0, highest, xtol=1e-15 * highest, rtol=1e-9) if excess(highest) > 0 else highest

    def precision(self, information: Tensor, delta: float) -> Tensor:
        """Return p = h + δ of one tensor, float32, within the bounds in which σ is finite and positive."""
        return (information.float() + delta).clamp_(PRECISION_FLOOR, PRECISION_CEILING)

    def sigma(self, information: Tensor, delta: float) -> Tensor:
        """Return σ = 1/√(λ·p) of one tensor, float32."""
        return self.precision(information, delta).mul_(self.ess).rsqrt_()


def first_prior(problem: FitProblem) -> Prior:
    """Return the prior of the settings, at λ of the settings or as training has it for as many examples and weights."""
    settings = problem.settings
    weights = sum(parameter.numel() for parameter in problem.parameters.values())
    ess = settings.ess or PRESETS["auto"].ess(len(problem.items), weights)
    return Prior(ess, settings.prior, settings.prior_strength)


def sigma_at(problem: FitProblem, information: Mapping[str, Tensor], prior: Prior) -> dict[str, Tensor]:
    """Return σ of all parameters at a prior; h is 0 where no loss depends on a parameter."""
    sigma = {}
    for name, parameter in problem.parameters.items():
        h = information[name] if name in information else torch.zeros_like(parameter, dtype=torch.float32)
        sigma[name] = prior.sigma(h, prior.delta(h, parameter.detach()))
    return sigma


def choose_ess(problem: FitProblem, information: Mapping[str, Tensor], prior: Prior) -> Prior:
    """Return the prior at the λ whose averaged draws have the lowest NLL on the validation data; without them `prior`.

    It is chosen from `FACTORS` times the λ of `prior`.
    """
    settings, reporter = problem.settings, problem.reporter
    if not settings.validation or problem.held_out is None:
        return prior
    ladder = [prior.ess * factor for factor in FACTORS]
    stage = Stage(reporter, "choosing λ", len(ladder) * settings.samples * len(problem.held_out.items))
    losses = []
    for ess in ladder:
        sigma = sigma_at(problem, information, prior._replace(ess=ess))
        losses.append(problem.nll(problem.posterior(FittedSigma(sigma)), 1.0, stage))
    best = min(range(len(ladder)), key=lambda i: losses[i])
    table = ", ".join(f"{ess:.3g}: {loss:.3f}" for ess, loss in zip(ladder, losses, strict=True))
    reporter.say(f"NLL on {settings.validation} by λ: {table}; λ = {ladder[best]:.3g}")
    if best in (0, len(ladder) - 1):
        edge = f"λ = {ladder[best]:.3g} is at the edge of what was tried"
        reporter.notify(f"{edge}; see what `ivon-post sweep` says of τ")
    return prior._replace(ess=ladder[best])


def fitted(problem: FitProblem, information: Mapping[str, Tensor], prior: Prior, steps: int = 0) -> FittedSigma:
    """Return σ from the information at a prior, with its header; `steps` are those of an iteration."""
    settings = problem.settings
    header = {
        "ess": str(prior.ess),
        "prior": str(settings.prior),
        "prior_strength": str(settings.prior_strength),
        "hessian": "fisher",
        "fit_labels": "data" if settings.empirical else "sampled",
        **({"fit_steps": str(steps)} if steps else {}),
        **({"fit_validation": Path(settings.validation).name} if settings.validation else {}),
    }
    return FittedSigma(sigma_at(problem, information, prior), header)
