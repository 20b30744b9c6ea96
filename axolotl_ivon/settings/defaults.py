"""What a setting is where nobody gives it. The optimizer, `attach` and the YAML keys all read it here."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Defaults(NamedTuple):
    """The hyperparameters of the paper's commonsense runs (arXiv 2506.14280), and what `attach` adds to them.

    They are what `IVONLoRA` does where it is told nothing; in training they are the preset "paper".

    Attributes:
        lr: learning rate α.
        gamma: γ of λ = γ·√N.
        betas: β1 of the gradient's and β2 of the precision's running average.
        h0: initial Hessian.
        clip: ξ.
        prior: "empirical", or δ of a fixed prior.
        prior_strength: κ, a factor on the prior's precision.
        hessian: what ĥ is of.
        h0_steps: number of steps that h0 counts as; None for a memory that stays the same.
        rescale_lr: whether the learning rate of a tensor is (h0 + δ)·α.
        preset: name of the preset that says what unset values are.
        eval_samples: number of draws that an evaluation averages over.
        draws: one draw for all processes, or one each.
    """

    lr: float = 1e-2
    gamma: float = 5000.0
    betas: tuple[float, float] = (0.9, 0.9995)
    h0: float = 5e-2
    clip: float = 5e-3
    prior: Literal["empirical"] | float = "empirical"
    prior_strength: float = 1.0
    hessian: Literal["reparameterized", "squared_gradients"] = "reparameterized"
    h0_steps: float | None = None
    rescale_lr: bool = False
    preset: Literal["auto", "paper", "small_data"] = "auto"
    eval_samples: int = 0
    draws: Literal["shared", "per_rank"] = "shared"


DEFAULTS = Defaults()
