"""A YAML that training refuses is refused by the forecast too, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.utils.schemas.config import AxolotlInputConfig

from axolotl_ivon import IVONError, IVONLoRAPlugin
from axolotl_ivon.integrations import checks
from axolotl_ivon.integrations.axolotl import ConfigError
from axolotl_ivon.integrations.checks import LORA_KEYS
from axolotl_ivon.integrations.forecast import forecast

BASE = {"optimizer": "ivon_lora", "adapter": "lora", "learning_rate": "3e-4", "lora_r": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.01}, "weight_decay: 0.01 has no effect"),
        ({"weight_decay": "none"}, "weight_decay: 'none' is not a number"),
        ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio: 16 has no effect"),
        ({"adam_beta2": 0.99}, "adam_beta2: 0.99 has no effect"),
        ({"adam_beta3": 0.99}, "adam_beta3: 0.99 has no effect"),
        ({"adam_epsilon2": 1e-16}, "adam_epsilon2: 1e-16 has no effect"),
        ({"adapter": None}, "adapter: None does not go with"),
        ({"rl": "ebft"}, "rl: ebft is not supported"),
        ({"rl": "gdpo"}, "rl: gdpo fails in axolotl with any adapter.*trl.multi_objective_aggregation: normalize_then"),
        ({"rl": "grpo", "ivon_rollout_draws": 2}, "ivon_rollout_draws: 2 has no effect without ivon_rollouts: draws"),
        ({"streaming": True}, "streaming: streamed data has no length"),
        ({"lora_rank": 8}, "lora_rank is not a key of axolotl.*did you mean lora_r"),
        ({"lora_target_module": ["q_proj"]}, "lora_target_module is .*did you mean lora_target_modules"),
    ],
)
def test_what_training_refuses_is_refused_before(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cfg = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(cfg))
    with pytest.raises(IVONError, match=f"^{message}"):
        forecast(path)
    with pytest.raises(ConfigError, match=f"^{message}"):
        IVONLoRAPlugin().register(cfg)


SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_lora_sync": True, "use_data_producer": True}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, ""),
        ({"vllm_mode": None}, "trl.use_vllm: true unless vllm_mode: server"),  # TRL then colocates it
        ({"vllm_mode": "colocate"}, "trl.use_vllm: true unless vllm_mode: server"),
        ({"vllm_lora_sync": False}, "trl.use_vllm: true unless .* and vllm_lora_sync: true"),
        ({"use_data_producer": None}, "trl.use_vllm: true unless .* use_data_producer: true"),
        ({"async_prefetch": True}, "trl.async_prefetch: True"),
    ],
)
def test_draws_go_to_a_server_as_adapters_or_not_at_all(changes: dict[str, Any], refused: str) -> None:
    trl = {key: value for key, value in {**SERVER, **changes}.items() if value is not None}
    cfg = {**BASE, "rl": "grpo", "ivon_rollouts": "draws", "gradient_accumulation_steps": 4, "trl": trl}
    if not refused:
        IVONLoRAPlugin().register(cfg)
        return
    with pytest.raises(ConfigError, match=f"^ivon_rollouts: draws does not go with {refused}"):
        IVONLoRAPlugin().register(cfg)


def test_the_tables_of_keys_are_axolotl_s() -> None:
    fields = AxolotlInputConfig.model_fields
    assert {key for key in fields if key.startswith("lora_")} <= set(LORA_KEYS)
    without = {key: fields[key].default for key in checks._WITHOUT_EFFECT if key in fields and fields[key].default}
    assert without == checks.AXOLOTL_DEFAULTS
