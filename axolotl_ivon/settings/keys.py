"""The keys that the plugin adds to axolotl's YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, create_model

from ..errors import IVONError, param_ref
from .table import OPTIMIZER, SETTINGS

# Values of unset keys that are the same by every preset. The fields themselves default to None, so that a run with
# another optimizer has no trace of them in its configuration.
DEFAULTS = {s.key: s.auto for s in SETTINGS if s.auto == s.paper and s.auto is not None}
_KEYS = {s.name: s.key for s in SETTINGS} | {"betas": "ivon_beta1 and ivon_beta2"}


_fields: dict[str, Any] = {}
for _setting in SETTINGS:
    _text: Any = {"description": f"IVON-LoRA: {_setting.help}. Default: {_setting.default}."}
    _fields[_setting.key] = (_setting.type | None, Field(default=None, json_schema_extra=_text))
IVONArgs = create_model("IVONArgs", __module__=__name__, **_fields)
IVONArgs.__doc__ = f"The `ivon_*` keys, read when `optimizer: {OPTIMIZER}` is set (IVON-LoRA, arXiv 2506.14280)."


def yaml_key(parameter: str) -> str:
    """Return the key that sets a parameter of `attach`, or the parameter itself where no key of ours does."""
    return _KEYS.get(parameter, parameter)


def attach_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `attach` by the keys of a YAML that are set."""
    given = {s.name: values[s.key] for s in SETTINGS if values.get(s.key) is not None}
    betas = given.pop("beta1", DEFAULTS["ivon_beta1"]), given.pop("beta2", None)
    return {**given, "betas": betas}


def prior_folder(prior: str | float | None) -> str | None:
    """Return the folder or Hub id that `ivon_prior` names, or None where it is something else."""
    return prior if isinstance(prior, str) and prior != "empirical" else None


def check_values(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `ivon_*` keys that a YAML sets, each with the type of its setting.

    Raises:
        IVONError: naming the key, its value and what it must be.
    """
    known = IVONArgs.model_fields
    for key in cfg:
        if str(key).startswith("ivon_") and key not in known:
            names = {name.removeprefix("ivon_"): name for name in known}
            nearest = difflib.get_close_matches(key.removeprefix("ivon_"), names, n=1, cutoff=0.55)
            fix = f"did you mean {names[nearest[0]]}?" if nearest else f"remove it; there are {', '.join(known)}"
            raise IVONError(f"{key} is not a key of optimizer: {OPTIMIZER}; {fix}")
    values = {key: cfg[key] for key in known if cfg.get(key) is not None}
    try:
        checked = IVONArgs.model_validate(values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        problems = [e["msg"] for e in error.errors() if e["loc"][0] == key]
        parts = (problem.removeprefix("Input should be ").removeprefix("Value error, ") for problem in problems)
        must = "; or ".join(parts)
        raise IVONError(f"{key}: {values[key]!r} is refused, it must be {must}") from error
    if "ivon_lambda" in values and "ivon_gamma" in values:
        raise IVONError("ivon_gamma and ivon_lambda are both set: λ is γ·√N or given outright, remove one")
    return checked.model_dump(exclude_none=True)


def sends_adapters(trl: Mapping[str, Any]) -> bool:
    """Return whether TRL's arguments have axolotl send adapters to a vLLM server, and not full weights.

    TRL's own mode is "colocate", and the Trainer that axolotl takes without a data producer sends no adapters.
    """
    return bool(trl.get("vllm_lora_sync") and trl.get("use_data_producer") and trl.get("vllm_mode") == "server")


def check_rollouts(
    rollouts: str,
    draws: int | None,
    *,
    online: bool,
    multiples: Mapping[str, int],
    full_weights: str = "",
    hindrance: str = "",
) -> int:
    """Return how many draws write a group of completions: 0 where the mean writes them.

    Args:
        rollouts, draws: the settings `rollouts` and `rollout_draws`.
        online: whether the run is GRPO.
        multiples: the numbers that the number of draws must divide, by the names of their settings: the completions of
            a group, and the micro-batches that completions are trained in. 0 stands for an unknown number.
        full_weights: the name of `use_vllm` if vLLM would get full weights; a draw can be sent as an adapter only.
        hindrance: a setting, with its value, with which completions are not written in this process by `generate`.

    Raises:
        IVONError: the values do not go together.
    """
    if rollouts not in ("mean", "draws"):
        raise IVONError(f"{param_ref('rollouts')}: {rollouts!r} is neither 'mean' nor 'draws'")
    if rollouts == "mean":
        if draws is not None:
            raise IVONError(
                f"{param_ref('rollout_draws')}: {draws} has no effect without {param_ref('rollouts')}: draws; set that"
            )
        return 0
    if not online:
        raise IVONError(f"{param_ref('rollouts')}: draws is for GRPO alone; remove it")
    if full_weights:
        raise IVONError(
            f"{param_ref('rollouts')}: draws needs a vLLM server that gets adapters: with {full_weights}: true set "
            "vllm_mode: server, use_data_producer: true and vllm_lora_sync: true"
        )
    if hindrance:
        raise IVONError(f"{param_ref('rollouts')}: draws does not go with {hindrance}; remove one of them")
    count = 2 if draws is None else draws
    if count < 1:
        raise IVONError(f"{param_ref('rollout_draws')}: {count} is refused, it must be at least 1")
    for name, value in multiples.items():
        if value % count:
            raise IVONError(
                f"{param_ref('rollout_draws')}: {count} does not divide {name}: {value}; choose a divisor of both "
                f"{' and '.join(multiples)}, so that all draws write equally many completions"
            )
    return count
