"""From the information of the data to σ: the prior's part.

The posterior is q = N(m, diag(σ²)) with σ² = 1/(λ·p), p = h + δ, as in training: h is the Fisher information of one
loss, δ the prior's part. For the empirical prior δ = κ/(λ·mean(m² + σ²)) by tensor (arXiv 2506.14280, Eq. 2; the
KL-optimal one at κ = 1), at the fixed point that it has with σ.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from ..optim.kernels.base import PRECISION_CEILING, PRECISION_FLOOR


class Prior(NamedTuple):
    """λ and the prior, as `IVONLoRA` has them.

    Attributes:
        ess: effective sample size λ.
        kind: "empirical", or δ of a fixed prior.
        strength: κ, a factor on δ.
    """

    ess: float
    kind: Literal["empirical"] | float = "empirical"
    strength: float = 1.0

    def delta(self, information: Tensor, mean: Tensor) -> float:
        """Return δ of one tensor, from h and m of the same shape.

        The empirical one is the root of κ = λ·mean(m²)·δ + mean(δ/(h + δ)), which rises with δ. Weights on which no
        example depends (h = 0: a token that does not occur, say) have the prior as their posterior, whatever it is, so
        they have no say in it; unless nothing depends on any of them. Where m is 0 all over and κ ≥ 1 there is no root:
        the KL-optimal prior is a point.
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
