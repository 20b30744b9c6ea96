"""Forecast a run from its YAML, before anything is loaded: N, steps, λ, learning rate, and how far weights can go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ..errors import IVONError, one_line
from ..posterior.adapter import Adapter
from ..posterior.chain import links
from ..posterior.findings import Finding, remembers_too_long, travel_finding
from ..settings.keys import prior_folder, yaml_key
from ..settings.presets import LONGEST_SIGN, MANY_PASSES, PRESETS, adapted_matrices, passes, usual_rate
from ..settings.table import OPTIMIZER, PLUGIN
from ..storage.format import regular_size
from .checks import GRPO_DEFAULTS, check_config, missing_lora_keys, number, slow_on_cpu

_YAML_LIMIT = 16 * 2**20
# Multiples of the peak after warmup, by the share of the steps after it that were done.
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant_with_warmup": lambda done: 1.0,
}


class _Unknown(Exception):
    """Why something is not known before the run."""


def forecast(path: str | Path, processes: int = 1) -> dict[str, Any]:
    """Return what an axolotl YAML with `optimizer: ivon_lora` will train with, as plain numbers, strings and lists.

    `train_size` is N, `steps` the optimizer's steps, `ess` λ, `learning_rate` the peak α, `travel` the farthest that a
    weight can get, Σ α_t·ξ. What cannot be known before data and model are loaded is None, and `unknown` says why. N is
    that of the files as they are, before axolotl leaves out examples that are too long. `findings` are dicts of
    `about`, `good` and `text`.

    Args:
        path: the YAML.
        processes: how many train, by which a step sees as many batches.

    Raises:
        IVONError: the file cannot be read, has another optimizer, or a key of ours has a wrong value.
    """
    cfg = _read(Path(path))
    if cfg.get("optimizer") != OPTIMIZER:
        raise IVONError(f"{path}: optimizer is {cfg.get('optimizer')}, so no posterior is trained; set {OPTIMIZER}")
    try:
        given, preset = check_config(cfg)
    except IVONError as error:
        raise IVONError(error.describe(yaml_key)) from error
    unknown: list[str] = []

    def known(find: Callable[[], Any]) -> Any:
        try:
            return find()
        except _Unknown as why:
            if str(why) not in unknown:
                unknown.append(str(why))
            return None

    micro, accumulated = _batch(cfg)
    batch = micro * accumulated * processes
    size = known(lambda: _train_size(cfg))
    loaded, repeated = _loads(cfg, micro * processes, accumulated)
    steps = known(lambda: _steps(cfg, size, (loaded, repeated), accumulated))
    prior = prior_folder(given["ivon_prior"])
    strength = preset.strength(given["ivon_prior"], bool(prior))
    ess, h0, asked = preset.fixed_ess, None if prior else preset.h0, number(cfg, "learning_rate")
    if size and preset.gamma is not None:
        ess = preset.ess(size, 0)
    epochs = number(cfg, "num_epochs", 1)
    if size and _most_steps(cfg) is not None:  # packed batches count as if they were not
        epochs = passes(steps or 1, size, accumulated * loaded / repeated)
    if not asked and preset.has_usual_rate:
        # None where it is not known; 0 is one by travel, or no rate.
        counted = bool(size) or _most_steps(cfg) is None
        asked = known(lambda: _usual_rate(cfg, prior, epochs if counted else 0.0 if _streams(cfg) else None))
    if (
        size
        and (ess is None or (h0 is None and not prior))
        and (shapes := known(lambda: _trained_shapes(cfg, prior, preset.ess(size, 0, epochs))))
    ):
        run = preset.for_run(size, shapes, asked or 0.0, steps or 1, epochs)
        ess, h0 = run["ess"], None if prior else run["h0"]
    step, long = (preset.step(asked or 0.0, steps or most, epochs) for most in (1, 10**9))
    by_hand = preset.fixed_ess is not None or preset.gamma is not None
    tau = step.tau if step.tau == long.tau and (by_hand or asked is not None) else None  # it depends on the steps
    beta2 = preset.second_beta(steps, step.direction) if steps else preset.beta2
    share = known(lambda: _mean_rate(cfg, steps, size, batch))
    rescaled = given["ivon_rescale_lr"]
    step_bound = preset.clip * (h0 or math.nan if rescaled else 1.0)
    lr: float | None = None if asked is None else preset.alpha(asked, rescaled)
    if lr == 0 and preset.travel is not None:
        lr = min(preset.travel / (share * steps), LONGEST_SIGN) / step_bound if share and steps else None
    travel = lr * share * steps * step_bound if lr is not None and share is not None and steps else None
    findings = []
    if PLUGIN not in (cfg.get("plugins") or []) and _needs_plugin_line():
        text = f"plugins has no {PLUGIN}: axolotl before 0.21 will say that {OPTIMIZER} is not a valid OptimizerNames"
        findings.append(Finding("plugins", False, text))
    if missing := missing_lora_keys(cfg):
        text = f"{', '.join(missing)}: none is given, and axolotl fails without it once it has loaded the model"
        findings.append(Finding("lora", False, f"{text}; set lora_r, 16 say, and lora_alpha, twice as much"))
    if slow := slow_on_cpu(cfg):
        findings.append(Finding("precision", False, slow))
    if asked and not number(cfg, "learning_rate"):
        text = f"learning_rate: none is given, so it is {asked:g}, which is usual for a model of this kind and width"
        findings.append(Finding("learning_rate", True, text))
    if travel is not None:
        findings.append(travel_finding(travel, lr or 0.0, by_hand=preset.travel is None))
    if steps is not None and beta2 is not None:
        memory, learns = f"{1 / (1 - beta2):,.0f}", True
        text = f"σ is learned from about the last {memory} of {steps:,} steps (β2 = {beta2:g})"
        if remembers_too_long(beta2, steps):
            # Then the running average has the weights of the steps since the start, which counts as some of them.
            if learns := preset.h0_steps is not None and steps > preset.h0_steps:
                text = f"σ is learned from all {steps:,} steps (β2 = {beta2:g}), and its start counts as "
                text += f"{preset.h0_steps:g} more"
            else:
                text = f"β2 = {beta2:g} remembers {memory} steps and the run has {steps:,}: "
                text += "σ will stay near where it begins"
        findings.append(Finding("sigma", learns, text))
    if prior:
        findings.append(_prior_finding(prior, strength))
    return {
        "config": str(path),
        "preset": given["ivon_preset"],
        "train_size": size,
        "steps": steps,
        "batch": batch,
        "ess": ess,
        "h0": h0,
        "prior": given["ivon_prior"],
        "prior_strength": strength,
        "clip": preset.clip,
        "beta2": beta2,
        "direction": step.direction,
        "tau": tau,
        "learning_rate": lr,
        "travel": travel,
        "unknown": unknown,
        "findings": [finding._asdict() for finding in findings],
    }


def _prior_finding(prior: str, strength: float) -> Finding:
    """Return which adapter is the prior, and how much its examples count."""
    adapter, auto = Adapter(prior), PRESETS["auto"]
    header = adapter.metadata
    seen = header.get("train_size") or "an unknown number of"
    text = f"continues {prior}: its {seen} examples count"
    if header.get("preset") == "auto" and not header.get("gamma"):
        # λ is at least that of some hundred examples.
        per_example = auto.per_example * max(1.0, adapter.mean.weights / auto.usual_weights)
        as_many = round(float(header["ess"]) / per_example)
        text += f" as {as_many}," if header.get("train_size", "").isdigit() and as_many > int(seen) else ""
    text += f" {strength:g} time{'' if strength == 1 else 's'} each"
    if before := len(links(header)):
        text += f", and so do those of the {before} adapters before it"
    return Finding("prior", True, text)


def _needs_plugin_line() -> bool:
    try:
        return tuple(int(part) for part in version("axolotl").split(".")[:2]) < (0, 21)
    except (PackageNotFoundError, ValueError):
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        if regular_size(path) > _YAML_LIMIT:
            raise IVONError(f"{path} is larger than {_YAML_LIMIT >> 20} MiB; it is no configuration")
        cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IVONError(f"{path}: no such file") from error
    except OSError as error:
        raise IVONError(f"{path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise IVONError(f"{path} is not valid YAML ({one_line(error)})") from error
    if not isinstance(cfg, dict):
        raise IVONError(f"{path} does not hold the keys of a configuration")
    return cfg


def _batch(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many examples a micro-batch has, and how many micro-batches a step of a process."""
    micro = int(number(cfg, "micro_batch_size", 1)) or 1
    accumulated = int(number(cfg, "gradient_accumulation_steps", number(cfg, "batch_size", micro) // micro)) or 1
    return micro, accumulated


def _streams(cfg: Mapping[str, Any]) -> bool:
    return bool(cfg.get("streaming") or cfg.get("pretraining_dataset"))


def _train_size(cfg: Mapping[str, Any]) -> int:
    if _streams(cfg):
        raise _Unknown("streamed data has no length")
    size = 0
    for dataset in cfg.get("datasets") or [{}]:
        keys = dataset if isinstance(dataset, dict) else {}
        if keys.get("shards"):
            raise _Unknown(f"N: of {keys.get('path')} only a part is used")
        files = keys.get("data_files") or keys.get("path")
        whole = sum(_examples(Path(str(file))) for file in (files if isinstance(files, list) else [files]))
        split = str(keys.get("split") or "train")
        try:
            if split != "train":
                from datasets import ReadInstruction

                parts = ReadInstruction.from_spec(split).to_absolute({"train": whole})
                whole = sum(max(0, part.to - part.from_) for part in parts)
        except (ImportError, ValueError, AssertionError) as error:
            raise _Unknown(f"N: the split {split} is not followed here ({one_line(error)})") from error
        size += whole
    held_out = number(cfg, "val_set_size", 0)
    # As in scikit-learn, which `datasets` follows.
    left = size - (int(held_out) if held_out >= 1 else math.ceil(held_out * size))
    if not size:
        raise IVONError("datasets: the files have no examples")
    if left < 1:
        raise IVONError(
            f"val_set_size: {held_out:g} leaves none of the {size} examples to train on; give a smaller one"
        )
    return left


def _examples(path: Path) -> int:
    """Return how many examples a local JSON or JSONL file has."""
    if path.suffix not in (".json", ".jsonl"):
        raise _Unknown(f"N: {path} is no JSON file here")
    if not path.is_file():
        raise _Unknown(f"N: there is no file {path} here")
    try:
        with path.open("rb") as file:
            if path.suffix == ".json" and file.read(1) == b"[":
                return len(json.loads(path.read_bytes()))
            file.seek(0)
            return sum(1 for line in file if line.strip())
    except (OSError, ValueError, RecursionError) as error:
        raise _Unknown(f"N: {path} cannot be read ({one_line(error)})") from error


def _loads(cfg: Mapping[str, Any], together: int, accumulated: int) -> tuple[int, int]:
    """Return how many rows all processes load at once, and in how many micro-batches these are trained on.

    `together` are the examples, or completions, of a micro-batch in all processes.
    """
    if cfg.get("rl") != "grpo":
        return together, 1
    trl = cfg.get("trl") or {}
    group, iterations = (int(number(trl, key, 0)) or default for key, default in GRPO_DEFAULTS.items())
    written = int(number(trl, "generation_batch_size")) or together * accumulated
    whole = "micro_batch_size × processes × gradient_accumulation_steps"
    for unit, named in ((group, "trl.num_generations"), (together, "micro_batch_size × processes")):
        if written % unit:
            raise IVONError(
                f"{named}: {unit} does not divide the {written} completions that are written at once; let it divide "
                f"trl.generation_batch_size, which is {whole} by default"
            )
    return written // group, written // together * iterations


def _steps(cfg: Mapping[str, Any], size: int | None, loads: tuple[int, int], accumulated: int) -> int:
    """Return the number of steps, as the Trainer counts them; `loads` are those of `_loads`."""
    rows, repeated = loads
    if cfg.get("rl") == "grpo" and size is not None and size < rows:
        raise IVONError(
            f"datasets have {size} prompts, and completions are written for {rows} at once: nothing would be trained; "
            "lower gradient_accumulation_steps or micro_batch_size, or raise trl.num_generations"
        )
    if most := _most_steps(cfg):
        return most
    if cfg.get("sample_packing"):
        raise _Unknown("steps: how many examples are packed together")
    if size is None:
        raise _Unknown("steps: they follow from N")
    epochs = number(cfg, "num_epochs", 1)
    if _counts_steps(cfg):
        return math.ceil(size * epochs / (rows * accumulated))
    # TRL leaves out the prompts of an epoch that are too few for a whole load; a loader of examples does not.
    in_epoch = size // rows if cfg.get("rl") == "grpo" else math.ceil(size / rows)
    return math.ceil(epochs * math.ceil(in_epoch * repeated / accumulated))


def _counts_steps(cfg: Mapping[str, Any]) -> bool:
    """Return whether axolotl counts the steps of the epochs itself, and gives the Trainer `max_steps`."""
    return cfg.get("max_steps") is None and cfg.get("rl") != "grpo"


def _most_steps(cfg: Mapping[str, Any]) -> int | None:
    """Return `max_steps`, or None for none, which -1 stands for as well."""
    return int(number({**cfg, "max_steps": None} if cfg.get("max_steps") == -1 else cfg, "max_steps")) or None


def _trained_shapes(cfg: Mapping[str, Any], prior: str | None, least: float) -> dict[str, Sequence[int]]:
    """Return the shapes of the weights to be trained, from the prior, or the base model's `config.json` here.

    `least` is λ with few weights.
    """
    if adapter := prior or cfg.get("lora_model_dir"):
        return {key: shape for key, (_, shape) in Adapter(str(adapter)).mean.specs.items()}
    grows = f"λ and h0: λ is {least:,.0f} up to 100,000 LoRA weights and in proportion to them from there on"
    folder = _config_folder(cfg)
    if folder is None:
        base = _base(cfg)
        raise _Unknown(f"{grows}; {base} is no folder here, nor in the Hub's cache, so they cannot be counted")
    try:
        return _lora_shapes(folder, cfg)
    except Exception as error:  # whatever a model of this kind needs
        raise _Unknown(f"{grows}, which cannot be counted ({one_line(error)})") from error


def _usual_rate(cfg: Mapping[str, Any], prior: str | None, epochs: float | None) -> float:
    """Return the learning rate that a run which gives none has, from the base model's `config.json` here."""
    text = "learning_rate: none is given, and the one that is usual follows from the base model's width and the epochs"
    if epochs is None:
        raise _Unknown(text)
    folder = _config_folder(cfg)
    if folder is None:
        raise _Unknown(f"{text}; {_base(cfg)} is no folder here, nor in the Hub's cache")
    try:
        from transformers import AutoConfig

        matrices = adapted_matrices(_trained_shapes(cfg, prior, 0.0)) if epochs > MANY_PASSES[0] else 0
        return usual_rate(AutoConfig.from_pretrained(folder, trust_remote_code=False), epochs, matrices)
    except Exception as error:  # whatever a model of this kind needs
        raise _Unknown(f"{text}, which cannot be read ({one_line(error)})") from error


def _base(cfg: Mapping[str, Any]) -> str:
    return str(cfg.get("base_model_config") or cfg.get("base_model"))


def _config_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Return the folder with the `config.json` of the base model, its own or in the Hub's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    base = _base(cfg)
    path: Any = Path(base, "config.json")
    if not path.is_file():
        with suppress(ValueError):  # no name of a repository
            path = try_to_load_from_cache(base, "config.json")
    return Path(path).parent if isinstance(path, (str, Path)) and Path(path).is_file() else None


def _lora_shapes(base: Path, cfg: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return the shapes of the adapter that axolotl would make, from a model without memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    targets = cfg.get("lora_target_modules") or []
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if cfg.get("lora_target_linear"):
            linear = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            output = model.get_output_embeddings()
            named = [name for name, module in linear.items() if module is not output]
            targets = [*([targets] if isinstance(targets, str) else targets), *named]
        lora = LoraConfig(
            r=int(number(cfg, "lora_r", 8)),
            target_modules=targets,
            rank_pattern=cfg.get("lora_rank_pattern") or {},
            layers_to_transform=cfg.get("peft_layers_to_transform"),
            modules_to_save=cfg.get("lora_modules_to_save") or None,
            task_type="CAUSAL_LM",
        )
        named_parameters = get_peft_model(model, lora).named_parameters()
    return {name: tuple(param.shape) for name, param in named_parameters if param.requires_grad}


def _mean_rate(cfg: Mapping[str, Any], steps: int | None, size: int | None, batch: int) -> float:
    """Return the mean of the learning rates as a multiple of the peak."""
    if not steps:
        raise _Unknown("travel: it follows from the steps")
    name = str(cfg.get("lr_scheduler") or "cosine")
    if name == "constant":
        return 1.0
    plain = not any(map(cfg.get, ("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_scheduler_kwargs")))
    if name not in _SCHEDULES or not plain:
        raise _Unknown(f"travel: the schedule {name}{'' if plain else ' with its options'} is not followed here")
    # axolotl takes the share of the steps that all epochs have, if these are fewer; and of -1.
    whole = math.ceil(size * number(cfg, "num_epochs", 1) / batch) if size else steps
    whole = -1 if cfg.get("max_steps") == -1 else min(steps, whole)
    if cfg.get("warmup_steps") is not None:
        warmup = int(number(cfg, "warmup_steps"))
    elif cfg.get("rl") == "grpo":  # whose steps axolotl does not count, so that the Trainer takes the share
        return _mean_of_rates(name, math.ceil(number(cfg, "warmup_ratio", 0.03) * steps), steps)
    elif cfg.get("warmup_ratio") is not None:
        warmup = max(int(number(cfg, "warmup_ratio") * whole), 0)
    else:
        warmup = min(int(0.03 * whole), 100)
    return _mean_of_rates(name, 2 if warmup == 1 else warmup, steps)  # all as axolotl has it


def _mean_of_rates(name: str, warmup: int, steps: int) -> float:
    rates = [step / warmup for step in range(min(warmup, steps))]
    rates += [_SCHEDULES[name]((step - warmup) / (steps - warmup)) for step in range(warmup, steps)]
    return sum(rates) / steps
