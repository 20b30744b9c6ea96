"""What is refused in an axolotl YAML with `optimizer: ivon_lora`, by training and by the forecast alike."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import IVONError
from ..posterior.adapter import Adapter
from ..posterior.chain import YAML_KEYS, check_prior
from ..settings.keys import DEFAULTS, check_rollouts, check_values, prior_folder, sends_adapters
from ..settings.presets import Preset, resolved
from ..settings.table import OPTIMIZER, SETTINGS

# Keys that need another optimizer, or act on what IVON does not have; and the way out of each.
_WITHOUT_EFFECT = {
    "loraplus_lr_ratio": "remove it: IVON's step is bounded for every weight by ivon_clip",
    "loraplus_lr_embedding": "remove it: IVON's step is bounded for every weight by ivon_clip",
    "lr_groups": "remove it: all weights share learning_rate",
    "embedding_lr": "remove it: all weights share learning_rate",
    "embedding_lr_scale": "remove it: all weights share learning_rate",
    "relora": "remove it: merging while training discards the posterior",
    "lisa_n_layers": "remove it: LISA trains base layers, not an adapter",
    "optim_args": "set the ivon_* keys instead",
    "optim_target_modules": "remove it: GaLore and its like replace the optimizer",
    "adam_beta1": "use ivon_beta1",
    "adam_beta2": "use ivon_beta2",
    "adam_beta3": "remove it: IVON has two running averages",
    "adam_epsilon": "remove it: IVON has no epsilon",
    "adam_epsilon2": "remove it: IVON has no epsilon",
    "unfrozen_parameters": "remove it: only adapter weights are trained",
}
# Those of them that axolotl sets itself: Ray's workers get the YAML with all the defaults filled in.
AXOLOTL_DEFAULTS = {"loraplus_lr_embedding": 1e-6}
# axolotl's keys of an adapter, of which it passes over one that it does not know.
# fmt: off
LORA_KEYS = (
    "lora_alpha", "lora_alpha_pattern", "lora_dropout", "lora_embedding_kernel", "lora_exclude_modules",
    "lora_fan_in_fan_out", "lora_fp32_gradients", "lora_mlp_kernel", "lora_model_dir", "lora_modules_to_save",
    "lora_o_kernel", "lora_on_cpu", "lora_qkv_kernel", "lora_r", "lora_rank_pattern", "lora_target_linear",
    "lora_target_modules", "lora_target_parameters",
)
# fmt: on
# Those of LORA_KEYS that axolotl switches on where the YAML has none of them.
_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# TRL's, where axolotl gives it none.
GRPO_DEFAULTS = {"num_generations": 8, "num_iterations": 1}
# Methods whose Trainers write completions in ways of their own, at a draw.
_OTHER_ONLINE_RL = ("ebft", "rloo", "ppo")


def number(cfg: Mapping[str, Any], key: str, default: float = 0.0, prefix: str = "") -> float:
    """Return a number of the YAML, which reads 1e-2 as a string; `prefix` is where a mapping below the top is.

    Raises:
        IVONError: it is no number, negative or not finite.
    """
    value = cfg.get(key)
    try:
        result = default if value is None else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not (math.isfinite(result) and result >= 0):
        raise IVONError(f"{prefix}{key}: {value!r} is not a number from 0 on")
    return result


def check_config(cfg: Mapping[str, Any], axolotl_keys: Collection[str] = ()) -> tuple[dict[str, Any], Preset]:
    """Return the values of all `ivon_*` keys that are set or have one default, and the preset with them in it.

    Args:
        cfg: the YAML, as it was written.
        axolotl_keys: further keys that the installed axolotl knows.

    Raises:
        IVONError: naming the key, its value and the fix.
    """
    given = {**DEFAULTS, **check_values(cfg)}
    _check_other_keys(cfg, {*LORA_KEYS, *axolotl_keys})
    preset = resolved(given["ivon_preset"], {s.name: given.get(s.key) for s in SETTINGS})
    if preset.travel is None and not number(cfg, "learning_rate"):
        raise IVONError(
            f"learning_rate: none is given, and ivon_preset: {given['ivon_preset']} has none of its own; set one, "
            "1e-2 to 1e-1 for IVON's step"
        )
    preset.alpha(number(cfg, "learning_rate"), given["ivon_rescale_lr"])
    preset = preset.with_direction(given["ivon_prior"], given["ivon_rescale_lr"], cfg.get("rl") == "grpo")
    _check_rollouts(cfg, given)
    if folder := prior_folder(given["ivon_prior"]):
        _check_prior(cfg, folder)
    return given, preset


def missing_lora_keys(cfg: Mapping[str, Any]) -> list[str]:
    """Return the keys of a new adapter that axolotl has no default for, and fails without while it loads the model."""
    return [] if cfg.get("lora_model_dir") else [key for key in ("lora_r", "lora_alpha") if cfg.get(key) is None]


def slow_on_cpu(cfg: Mapping[str, Any]) -> str:
    """Return why a step takes long on this machine, and what to set; empty where it has a GPU, or the YAML is right.

    SmolLM2-135M takes 80 s a step on two cores in the half precision that axolotl's `bf16: auto` is there, and 3 s in
    float32. With `bf16: false` and `bfloat16: true` the weights are bfloat16, which some CPUs multiply in hardware.
    """
    precisions = {"bf16": "auto", **cfg}
    if precisions["bf16"] == "auto" and cfg.get("fp16") is False:  # then auto is float32 where there is no GPU
        precisions["bf16"] = None
    key = next((name for name in ("bf16", "bfloat16", "fp16", "float16") if precisions.get(name)), "")
    if not key:
        return ""
    import torch

    if torch.accelerator.is_available():
        return ""
    kinds = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if key == "bfloat16" and any(getattr(torch.cpu, kind, bool)() for kind in kinds):
        return ""
    cure = f"{key}: false"
    if not cfg.get("rl") and all(cfg.get(kernel) is None for kernel in _LORA_KERNELS):
        cure += ", and lora_mlp_kernel: false, as axolotl's LoRA kernels need a GPU"
    set_to = f"{key}: {precisions[key]} is" if key in cfg else f"{key} is {precisions[key]} by default, which is"
    text = f"{set_to} half precision, and there is no GPU here"
    return f"{text}: a step takes about 25 times as long as in float32; set {cure}"


def _check_prior(cfg: Mapping[str, Any], folder: str) -> None:
    """Refuse an earlier adapter that does not fit the YAML, before a model is loaded."""
    named = f"ivon_prior: {folder}"
    begin = cfg.get("lora_model_dir")
    if begin and str(begin) != folder and os.path.realpath(str(begin)) != os.path.realpath(folder):
        raise IVONError(f"{named} is not lora_model_dir: {begin}; name the same adapter in both, or ivon_prior alone")
    if cfg.get("output_dir") and os.path.realpath(str(cfg["output_dir"])) == os.path.realpath(folder):
        raise IVONError(f"{named} is output_dir as well, and would be overwritten; choose another output_dir")
    if cfg.get("ivon_h0") is not None:
        raise IVONError(f"ivon_h0: {cfg['ivon_h0']} has no effect with {named}, whose σ it begins with; remove it")
    if cfg.get("ivon_rescale_lr"):
        raise IVONError(f"ivon_rescale_lr: true does not go with {named}; remove it")
    if begin:  # the adapter is the one that is saved there, whatever the YAML says
        check_prior(folder, {})
        return
    # PEFT sets fan_in_fan_out by the kind of layer, whatever the YAML says.
    keys = {name: key for name, key in YAML_KEYS.items() if name not in ("r", "fan_in_fan_out")}
    config: dict[str, Any] = {n: cfg.get(key) or ({} if "pattern" in n else False) for n, key in keys.items()}
    numbers = {"r": "lora_r", "lora_alpha": "lora_alpha"}
    config |= {name: int(number(cfg, key)) for name, key in numbers.items() if cfg.get(key) is not None}
    check_prior(folder, {**config, "base_model_name_or_path": cfg.get("base_model")})
    targets, held = cfg.get("lora_target_modules"), Adapter(folder).config.get("target_modules")
    if isinstance(targets, list) and isinstance(held, list) and not cfg.get("lora_target_linear"):
        own, other = (", ".join(sorted({*map(str, names)})) for names in (held, targets))
        if own != other:
            raise IVONError(f"{named} is on {own} and this adapter on {other}; set lora_target_modules: [{own}]")


def _check_other_keys(cfg: Mapping[str, Any], known: Collection[str]) -> None:
    if cfg.get("adapter") not in ("lora", "qlora"):
        raise IVONError(
            f"adapter: {cfg.get('adapter')} does not go with optimizer: {OPTIMIZER}; set adapter: lora or qlora"
        )
    for key, way_out in _WITHOUT_EFFECT.items():
        if cfg.get(key) and cfg[key] != AXOLOTL_DEFAULTS.get(key):
            raise IVONError(f"{key}: {cfg[key]} has no effect with optimizer: {OPTIMIZER}; {way_out}")
    for key in cfg:
        if str(key).startswith("lora_") and cfg[key] is not None and key not in known:
            nearest = difflib.get_close_matches(str(key), LORA_KEYS, n=1, cutoff=0.75)
            if nearest:
                raise IVONError(f"{key} is not a key of axolotl, which would pass over it; did you mean {nearest[0]}?")
    if number(cfg, "weight_decay"):
        raise IVONError(
            f"weight_decay: {cfg['weight_decay']} has no effect with optimizer: {OPTIMIZER}; the prior takes its "
            "place: remove it, or set ivon_prior to a number"
        )
    if number(cfg, "val_set_size") == 1:
        raise IVONError(
            "val_set_size: 1 is all of the data for axolotl, which leaves none to train on; set a number of examples "
            "from 2 on, or a share below 1"
        )
    for key in ("streaming", "pretraining_dataset"):
        if cfg.get(key) and cfg.get("ivon_lambda") is None:
            raise IVONError(f"{key}: streamed data has no length for λ; set ivon_lambda, 1e7 say")
    if cfg.get("ivon_eval_samples") and not (cfg.get("val_set_size") or cfg.get("test_datasets")):
        raise IVONError(
            f"ivon_eval_samples: {cfg['ivon_eval_samples']} has no effect without evaluation data; set val_set_size or "
            "test_datasets, or remove it"
        )
    for key in ("rl", "reward_model", "process_reward_model"):
        if cfg.get("ivon_eval_samples") and cfg.get(key):
            raise IVONError(f"ivon_eval_samples averages the predictions of a causal LM; remove it with {key}")
    if cfg.get("rl") in _OTHER_ONLINE_RL:
        raise IVONError(
            f"rl: {cfg['rl']} is not supported with optimizer: {OPTIMIZER}, its completions would come from a draw; "
            "use rl: grpo, or another optimizer"
        )
    if cfg.get("rl") == "gdpo":
        raise IVONError(
            "rl: gdpo fails in axolotl with any adapter, which TRL is given twice; set rl: grpo and "
            "trl.multi_objective_aggregation: normalize_then_sum, which is GDPO"
        )


def _check_rollouts(cfg: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse here, before a model is loaded, what `attach` would refuse of a GRPO Trainer."""
    trl = cfg.get("trl") or {}
    if not isinstance(trl, Mapping):
        raise IVONError(f"trl: {trl!r} holds no keys; give a mapping, such as trl: {{num_generations: 8}}")
    hindrances = {f"trl.{key}: {trl.get(key)}": trl.get(key) for key in ("async_prefetch", "rollout_func")}
    generations = int(number(trl, "num_generations", prefix="trl.") or GRPO_DEFAULTS["num_generations"])
    # With a size of its own, batches of completions are of as many micro-batches as processes make of it.
    steps = 0 if trl.get("generation_batch_size") else int(number(cfg, "gradient_accumulation_steps", 1))
    check_rollouts(
        given["ivon_rollouts"],
        given.get("ivon_rollout_draws"),
        online=cfg.get("rl") == "grpo",
        multiples={"num_generations": generations, "gradient_accumulation_steps": steps},
        full_weights="trl.use_vllm" if trl.get("use_vllm") and not sends_adapters(trl) else "",
        hindrance=next((name for name, value in hindrances.items() if value), ""),
    )
