"""The keys that the plugin adds to axolotl's YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..errors import IVONError
from .defaults import DEFAULTS as _DEFAULTS

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# From left to right: 1e-3 is a string in YAML, and a number.
Prior = Annotated[
    Literal["empirical"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] | Annotated[str, Field(min_length=1)],
    Field(union_mode="left_to_right"),
]
Average = Annotated[float, Field(ge=0, lt=1)]

# What an unset key means, where the preset has nothing to say of it. The fields themselves default to None, so that a
# run with another optimizer has no trace of them in its configuration.
DEFAULTS = {
    **{f"ivon_{name}": getattr(_DEFAULTS, name) for name in ("preset", "prior", "rescale_lr", "eval_samples", "draws")},
    "ivon_beta1": _DEFAULTS.betas[0],
}


# What it means by preset: by `auto`, and by `paper`.
BY_PRESET = {
    "ivon_gamma": "unset, 5000 by `paper`",
    "ivon_lambda": "1000·N or more, γ·√N by `paper`",
    "ivon_h0": "by λ, 0.05 by `paper`",
    "ivon_clip": "0.01, 0.005 by `paper`",
    "ivon_beta2": "by the steps, 0.9995 by `paper`",
    "ivon_prior_strength": "0.1, with an earlier adapter 300; 1 by `paper`",
    "ivon_hessian": "`squared_gradients`, `reparameterized` by `paper`",
    "ivon_h0_steps": "10, unset by `paper`",
}


def _key(name: str, description: str) -> Any:
    default = BY_PRESET.get(name) or DEFAULTS.get(name)
    shown = "unset" if default is None else f"{default:g}" if isinstance(default, float) else str(default).lower()
    return Field(default=None, json_schema_extra={"description": f"IVON-LoRA: {description} Default: {shown}."})


class IVONArgs(BaseModel):
    """The `ivon_*` keys, read when `optimizer: ivon_lora` is set (IVON-LoRA, arXiv 2506.14280)."""

    ivon_preset: Literal["auto", "paper", "small_data"] | None = _key(
        "ivon_preset",
        "what unset keys are. `auto` fits them to N, the steps and the LoRA weights, and reads a learning_rate below "
        "1e-3 as the most that a step may move a weight; `paper`: the paper's; `small_data`: another name for `auto`.",
    )
    ivon_gamma: Positive | None = _key(
        "ivon_gamma",
        "γ of the effective sample size λ = γ·√N, N being the number of training examples.",
    )
    ivon_lambda: Positive | None = _key(
        "ivon_lambda",
        "the effective sample size λ itself, instead of ivon_gamma; needed for streamed data.",
    )
    ivon_h0: Positive | None = _key("ivon_h0", "the initial Hessian; smaller means wider draws at the start.")
    ivon_clip: Positive | None = _key(
        "ivon_clip",
        "ξ, the bound on each weight's preconditioned gradient, so a step moves it by at most lr·ξ.",
    )
    ivon_beta1: Average | None = _key("ivon_beta1", "β1, the running average of the gradient.")
    ivon_beta2: Average | None = _key("ivon_beta2", "β2, the running average of the posterior precision.")
    ivon_prior: Prior | None = _key(
        "ivon_prior",
        "`empirical` for the prior that fits each tensor best, a number δ for a fixed prior (IVON's weight decay), or "
        "an earlier adapter with σ, a folder or a Hub id, to go on from with new data and not forget the old.",
    )
    ivon_prior_strength: Positive | None = _key(
        "ivon_prior_strength",
        "κ, a factor on the prior's precision; smaller lets σ show more of the data, and forgets an earlier adapter "
        "faster.",
    )
    ivon_hessian: Literal["reparameterized", "squared_gradients"] | None = _key(
        "ivon_hessian",
        "what the Hessian is estimated by: `squared_gradients`, B·ĝ², or `reparameterized`, IVON's ĝ·(θ−m)/σ².",
    )
    ivon_h0_steps: Positive | None = _key(
        "ivon_h0_steps",
        "number of steps that ivon_h0 counts as; unset, it fades as β2^t.",
    )
    ivon_rescale_lr: bool | None = _key(
        "ivon_rescale_lr",
        "whether the learning rate of a tensor is (h0 + δ)·learning_rate, the optional line of IVON's algorithm; "
        "learning_rate is then 1/h0 times as large.",
    )
    ivon_eval_samples: Annotated[int, Field(ge=0)] | None = _key(
        "ivon_eval_samples",
        "number of draws whose averaged prediction every evaluation scores too, logged as eval_loss_posterior.",
    )
    ivon_draws: Literal["shared", "per_rank"] | None = _key(
        "ivon_draws",
        "`shared` for the same draw in all processes, `per_rank` for one each, with gradients and Hessians averaged.",
    )


def prior_folder(prior: str | float | None) -> str | None:
    """Return the folder or Hub id that `ivon_prior` names, or None where it is something else."""
    return prior if isinstance(prior, str) and prior != "empirical" else None


def check_values(cfg: Mapping[str, Any]) -> IVONArgs:
    """Return the `ivon_*` keys of a YAML as it was read.

    Raises:
        IVONError: naming the key, its value and what it must be.
    """
    known = IVONArgs.model_fields
    for key in cfg:
        if str(key).startswith("ivon_") and key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise IVONError(f"{key} is not a key of optimizer: ivon_lora; did you mean {nearest}?")
    values = {key: cfg[key] for key in known if cfg.get(key) is not None}
    try:
        checked = IVONArgs.model_validate(values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        problems = [e for e in error.errors() if e["loc"][0] == key]
        must = "; or ".join(e["msg"].removeprefix("Input should be ") for e in problems)
        raise IVONError(f"{key}: {values[key]!r} is refused, it must be {must}") from error
    if "ivon_lambda" in values and "ivon_gamma" in values:
        raise IVONError("ivon_gamma and ivon_lambda are both set: λ is γ·√N or given outright, remove one")
    return checked
