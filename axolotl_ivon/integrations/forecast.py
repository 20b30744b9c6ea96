"""Forecast a run from its YAML, before anything is loaded: N, steps, λ, learning rate, and how far weights can go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ..errors import IVONError, one_line
from ..posterior.adapter import Adapter
from ..posterior.chain import check_prior, links
from ..posterior.findings import Finding, remembers_too_long, travel_finding
from ..settings.keys import DEFAULTS, check_values, prior_folder, yaml_key
from ..settings.presets import resolved
from ..settings.table import OPTIMIZER, PLUGIN, SETTINGS
from ..storage.format import regular_size

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
    given = {**DEFAULTS, **check_values(cfg)}
    preset = resolved(given["ivon_preset"], {s.name: given.get(s.key) for s in SETTINGS})
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
    steps = known(lambda: _steps(cfg, size, micro * processes, accumulated))
    ess = preset.fixed_ess
    if ess is None and size:
        # Packed batches count as if they were not.
        most = int(_number(cfg, "max_steps", 0))
        ess = preset.ess(size, 0, most * batch / size if most else _number(cfg, "num_epochs", 1))
        if preset.gamma is None:
            unknown.append(
                f"λ: it is larger from {preset.usual_weights:,.0f} LoRA weights on, in proportion to their number"
            )
    prior = prior_folder(given["ivon_prior"])
    strength = preset.posterior_strength if prior else preset.prior_strength
    h0 = None if prior else preset.h0
    if h0 is None and not prior:
        unknown.append("h0: it follows from λ and the layers of the model")
    beta2 = preset.second_beta(steps) if steps else preset.beta2
    share = known(lambda: _mean_rate(cfg, steps))
    rescaled = given["ivon_rescale_lr"]
    step_bound = preset.clip * (h0 or math.nan if rescaled else 1.0)
    rate = _number(cfg, "learning_rate", 0.0)
    lr: float | None = preset.alpha(rate, rescaled)
    if preset.travel is not None and not rate:
        lr = preset.travel / (step_bound * share * steps) if share and steps else None
    travel = lr * share * steps * step_bound if lr is not None and share is not None and steps else None
    findings = []
    if PLUGIN not in (cfg.get("plugins") or []) and _needs_plugin_line():
        text = f"plugins has no {PLUGIN}: axolotl before 0.21 will say that {OPTIMIZER} is not a valid OptimizerNames"
        findings.append(Finding("plugins", False, text))
    if travel is not None:
        findings.append(travel_finding(travel, lr or 0.0, by_hand=preset.travel is None))
    if steps is not None and beta2 is not None:
        learns = not remembers_too_long(beta2, steps)
        text = f"β2 = {beta2:g} remembers {1 / (1 - beta2):,.0f} steps and the run has {steps:,}"
        findings.append(Finding("sigma", learns, text if learns else f"{text}: σ will stay near where it begins"))
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
        "learning_rate": lr,
        "travel": travel,
        "unknown": unknown,
        "findings": [finding._asdict() for finding in findings],
    }


def _prior_finding(prior: str, strength: float) -> Finding:
    """Return which adapter is the prior, and how much its examples count."""
    try:
        check_prior(prior, {})
    except IVONError as error:
        raise IVONError(error.describe(yaml_key)) from error
    header = Adapter(prior).metadata
    seen = header.get("train_size") or "an unknown number of"
    text = f"continues {prior}: its {seen} examples count {strength:g} time{'' if strength == 1 else 's'} each"
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


def _number(cfg: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of the YAML, which reads 1e-2 as a string."""
    value = cfg.get(key)
    try:
        number = default if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise IVONError(f"{key}: {value!r} is not a number from 0 on")
    return number


def _batch(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many examples a micro-batch has, and how many micro-batches a step of a process."""
    micro = int(_number(cfg, "micro_batch_size", 1)) or 1
    accumulated = int(_number(cfg, "gradient_accumulation_steps", _number(cfg, "batch_size", micro) // micro)) or 1
    return micro, accumulated


def _train_size(cfg: Mapping[str, Any]) -> int:
    if cfg.get("streaming") or cfg.get("pretraining_dataset"):
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
    held_out = _number(cfg, "val_set_size", 0)
    # As in scikit-learn, which `datasets` follows.
    return size - (int(held_out) if held_out >= 1 else math.ceil(held_out * size))


def _examples(path: Path) -> int:
    """Return how many examples a local JSON or JSONL file has."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise _Unknown(f"N: {path} is no JSON file here")
    try:
        with path.open("rb") as file:
            if path.suffix == ".json" and file.read(1) == b"[":
                return len(json.loads(path.read_bytes()))
            file.seek(0)
            return sum(1 for line in file if line.strip())
    except (OSError, ValueError, RecursionError) as error:
        raise _Unknown(f"N: {path} cannot be read ({one_line(error)})") from error


def _steps(cfg: Mapping[str, Any], size: int | None, together: int, accumulated: int) -> int:
    """Return the number of steps, as the Trainer counts them; `together` examples are in a micro-batch of all."""
    most = int(_number(cfg, "max_steps", 0))
    if most:
        return most
    if cfg.get("sample_packing"):
        raise _Unknown("steps: how many examples are packed together")
    if size is None:
        raise _Unknown("steps: they follow from N")
    in_epoch = math.ceil(math.ceil(size / together) / accumulated)
    return math.ceil(_number(cfg, "num_epochs", 1) * in_epoch)


def _mean_rate(cfg: Mapping[str, Any], steps: int | None) -> float:
    """Return the mean of the learning rates as a multiple of the peak."""
    if not steps:
        raise _Unknown("travel: it follows from the steps")
    name = str(cfg.get("lr_scheduler") or "cosine")
    if name == "constant":
        return 1.0
    plain = not any(map(cfg.get, ("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_scheduler_kwargs")))
    if name not in _SCHEDULES or not plain:
        raise _Unknown(f"travel: the schedule {name}{'' if plain else ' with its options'} is not followed here")
    if cfg.get("warmup_steps") is not None:
        warmup = int(_number(cfg, "warmup_steps", 0))
    elif cfg.get("warmup_ratio") is not None:
        warmup = int(_number(cfg, "warmup_ratio", 0) * steps)
    else:
        warmup = min(int(0.03 * steps), 100)
    warmup = 2 if warmup == 1 else warmup  # all as axolotl has it
    rates = [step / warmup for step in range(min(warmup, steps))]
    rates += [_SCHEDULES[name]((step - warmup) / (steps - warmup)) for step in range(warmup, steps)]
    return sum(rates) / steps
