"""What all kernels share: the constants of a step, and the bounds that keep it finite."""

from __future__ import annotations

from typing import NamedTuple

# Bounds on p that keep σ = 1/√(λ·p) finite and positive in float32 for every λ that is accepted. The update
# keeps p positive; the floor is there for rounding, the ceiling for gradients whose square overflows.
PRECISION_FLOOR, PRECISION_CEILING = 1e-12, 1e24
# A step that is longer overflows sooner or later, whatever lr and clip allow.
TRAVEL = 1e18


class Constants(NamedTuple):
    """The numbers in the update that are the same for all weights of a piece."""

    debias: float  # 1 − β1^t
    beta1: float
    beta2: float
    product: float  # what turns ĝ·(θ−m) into ĥ/p
    bound: float  # ξ
    lr: float
    fixed: bool  # whether the prior is a number, so that it acts on m as well
