"""A YAML that training refuses is refused by the forecast too, in the same words."""

from __future__ import annotations

from collections.abc import Callable
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

BASE = {"optimizer": "ivon_lora", "adapter": "lora"}
DRAWS = {"rl": "grpo", "ivon_rollouts": "draws", "ivon_rollout_draws": 2}
USELESS = ["loraplus_lr_ratio", "loraplus_lr_embedding", "lr_groups", "embedding_lr", "embedding_lr_scale", "relora"]
USELESS += ["lisa_n_layers", "optim_target_modules", "unfrozen_parameters", "adam_epsilon", "adam_epsilon2"]
TO_SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_lora_sync": True, "use_data_producer": True}
SERVED = {**DRAWS, "gradient_accumulation_steps": 4, "trl": TO_SERVER}


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """A function that returns the one line in which both training and the forecast refuse a YAML with these changes."""

    def refuse(changes: dict[str, Any]) -> str:
        cfg, path = {**BASE, **changes}, tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(cfg))
        with pytest.raises(IVONError) as before:
            forecast(path)
        with pytest.raises(ConfigError) as error:
            IVONLoRAPlugin().register(cfg)
        assert str(error.value) == str(before.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ivon_preset": "tiny"}, ["ivon_preset", "'tiny'", "'auto' or 'paper'"]),
        ({"ivon_hessian": "exact"}, ["ivon_hessian", "'exact'", "'reparameterized' or 'squared_gradients'"]),
        ({"ivon_prior_strength": 0}, ["ivon_prior_strength", "0", "greater than 0"]),
        ({"ivon_gamma": 0}, ["ivon_gamma", "0", "greater than 0"]),
        ({"ivon_gamma": float("inf")}, ["ivon_gamma", "inf", "finite"]),
        ({"ivon_lambda": -1e7}, ["ivon_lambda", "-10000000.0", "greater than 0"]),
        ({"ivon_h0": "small"}, ["ivon_h0", "'small'", "number"]),
        ({"ivon_clip": 0.0}, ["ivon_clip", "0.0", "greater than 0"]),
        ({"ivon_beta1": 1}, ["ivon_beta1", "1", "less than 1"]),
        ({"ivon_beta2": -0.1}, ["ivon_beta2", "-0.1", "greater than or equal to 0"]),
        ({"ivon_prior": "flat"}, ["ivon_prior", "'flat'", "'empirical'", "number"]),
        ({"ivon_prior": "outputs/monday"}, ["ivon_prior: 'outputs/monday' is refused", "no such folder"]),
        ({"ivon_prior": ""}, ["ivon_prior", "''", "'empirical'"]),
        ({"ivon_prior": -1.0}, ["ivon_prior", "-1.0", "greater than or equal to 0"]),
        ({"ivon_gama": 1}, ["ivon_gama", "did you mean ivon_gamma?"]),
        ({"ivon_tau": 2}, ["ivon_tau is not a key", "remove it; there are ivon_preset,"]),
        ({"ivon_gamma": True}, ["ivon_gamma: True is refused, it must be a number"]),
        ({"ivon_prior": True}, ["ivon_prior: True is refused, it must be a number"]),
        ({"trl": "x"}, ["trl: 'x' holds no keys; give a mapping"]),
        ({"trl": {"num_generations": "x"}}, ["trl.num_generations: 'x' is not a number"]),
        ({"ivon_weight_prior": 1}, ["ivon_weight_prior", "ivon_prior"]),
        ({"ivon_gamma": 1, "ivon_lambda": 1e7}, ["ivon_gamma", "ivon_lambda", "remove one"]),
        ({"adapter": None}, ["adapter", "None", "lora or qlora"]),
        ({"adapter": "llama-adapter"}, ["adapter", "llama-adapter", "lora or qlora"]),
        ({"streaming": True}, ["streaming", "ivon_lambda"]),
        ({"pretraining_dataset": "x"}, ["pretraining_dataset", "ivon_lambda"]),
        *(({key: 0.5}, [key, "0.5 has no effect", "remove it"]) for key in USELESS),
        ({"weight_decay": 0.1}, ["weight_decay", "0.1", "ivon_prior"]),
        ({"weight_decay": 0.1, "ivon_prior": 0.1}, ["weight_decay", "0.1", "remove"]),
        ({"weight_decay": "none"}, ["weight_decay: 'none' is not a number"]),
        ({"optim_args": {"a": 1}}, ["optim_args", "ivon_"]),
        ({"ivon_preset": "paper"}, ["learning_rate: none is given, and ivon_preset: paper has none of its own"]),
        ({"val_set_size": 1}, ["val_set_size: 1 is all of the data for axolotl"]),
        ({"adam_beta2": 0.99}, ["adam_beta2", "ivon_beta2"]),
        ({"adam_beta3": 0.99}, ["adam_beta3: 0.99 has no effect"]),
        ({"lora_rank": 8}, ["lora_rank is not a key of axolotl", "did you mean lora_r?"]),
        ({"lora_target_module": ["q_proj"]}, ["lora_target_module is not", "did you mean lora_target_modules?"]),
        ({"rl": "ebft"}, ["rl: ebft", "rl: grpo"]),
        (
            {"rl": "gdpo"},
            ["rl: gdpo fails in axolotl with any adapter", "trl.multi_objective_aggregation: norm"],
        ),
        ({"rl": "grpo", "ivon_rollout_draws": 2}, ["ivon_rollout_draws: 2 has no effect without ivon_rollouts: draws"]),
        ({**DRAWS, "rl": "dpo"}, ["ivon_rollouts: draws is for GRPO"]),
        ({**DRAWS, "ivon_rollout_draws": 3}, ["ivon_rollout_draws: 3 does not divide num_generations: 8"]),
        (DRAWS, ["ivon_rollout_draws: 2 does not divide gradient_accumulation_steps: 1"]),
        (
            {**DRAWS, "ivon_rollout_draws": 0},
            ["ivon_rollout_draws: 0 is refused, it must be greater than or equal to 1"],
        ),
        ({**DRAWS, "trl": {"num_generations": 1}}, ["ivon_rollout_draws: 2 does not divide num_generations: 1"]),
        *(
            ({**SERVED, "trl": {**TO_SERVER, key: value}}, ["ivon_rollouts: draws needs a vLLM server", named])
            for key, value, named in (
                ("vllm_mode", None, "with trl.use_vllm: true set vllm_mode: server"),  # TRL then colocates it
                ("vllm_mode", "colocate", "with trl.use_vllm: true set vllm_mode: server"),
                ("vllm_lora_sync", False, "and vllm_lora_sync: true"),
                ("use_data_producer", None, "use_data_producer: true"),
            )
        ),
        (
            {**SERVED, "trl": {**TO_SERVER, "async_prefetch": True}},
            ["ivon_rollouts: draws does not go with", "trl.async_prefetch: True"],
        ),
        ({"ivon_rollouts": "both"}, ["ivon_rollouts", "'both'", "'mean' or 'draws'"]),
        ({"rl": "dpo", "ivon_eval_samples": 4, "val_set_size": 2}, ["ivon_eval_samples", "rl"]),
        ({"ivon_eval_samples": 4}, ["ivon_eval_samples: 4", "val_set_size", "test_datasets"]),
        ({"ivon_eval_samples": 2.5}, ["ivon_eval_samples", "2.5", "integer"]),
        ({"ivon_rescale_lr": "maybe"}, ["ivon_rescale_lr", "'maybe'", "boolean"]),
    ],
)
def test_what_would_be_ignored_or_is_out_of_range_is_refused(
    changes: dict[str, Any], words: list[str], refusal: Any
) -> None:
    message = refusal(changes)
    assert all(word in message for word in words), message
    IVONLoRAPlugin().register({**BASE, **changes, "optimizer": "adamw_torch"})


def test_an_earlier_adapter_unlike_the_yaml_is_refused(make_adapter: Any, refusal: Any) -> None:
    monday, other, plain = make_adapter(seed=1), make_adapter(seed=2), make_adapter(sigma=False)
    given = {**BASE, "ivon_prior": str(monday)}
    for changes, words in (
        ({"lora_model_dir": str(other)}, f"ivon_prior: {monday} is not lora_model_dir: {other}; name the same adapter"),
        ({"lora_r": 8}, f"ivon_prior: {monday} has r 4 and this adapter 8; set lora_r: 4"),
        ({"lora_r": 4, "lora_alpha": 16}, "has lora_alpha 8 and this adapter 16; set lora_alpha: 8"),
        ({"output_dir": f"{monday}/."}, f"ivon_prior: {monday} is output_dir as well, and would be overwritten"),
        ({"ivon_h0": 0.1}, f"ivon_h0: 0.1 has no effect with ivon_prior: {monday}"),
        ({"ivon_rescale_lr": True}, "ivon_rescale_lr: true does not go with ivon_prior"),
        ({"peft_use_dora": True}, "has use_dora False and this adapter True; set peft_use_dora: False"),
        ({"peft_use_rslora": True}, "has use_rslora False and this adapter True; set peft_use_rslora: False"),
        ({"lora_alpha_pattern": {"q_proj": 32}}, "set lora_alpha_pattern: {}"),
        ({"ivon_prior": str(make_adapter(rank_pattern={"q_proj": 2}))}, "set lora_rank_pattern: {'q_proj': 2}"),
        ({"base_model": "some/other"}, "and this adapter over other; give a posterior over that"),
        (
            {"lora_target_modules": ["q_proj"]},
            "is on q_proj, v_proj and this adapter on q_proj; set lora_target_modules: [q_proj, v_proj]",
        ),
        ({"ivon_prior": str(plain)}, f"ivon_prior: {plain} has no σ, so it is no posterior"),
        ({"ivon_prior": str(make_adapter(facts={"tau": "inf"}))}, "has tau inf, so it has no width"),
        ({"ivon_prior": str(make_adapter(facts={"pruned_ratio": "0.1"}))}, "is pruned"),
    ):
        assert words in refusal({**given, **changes})
    IVONLoRAPlugin().register(given)
    IVONLoRAPlugin().register({**given, "lora_fan_in_fan_out": True})  # PEFT sets it by the kind of layer
    IVONLoRAPlugin().register({**given, "lora_r": 4, "lora_alpha": 8, "lora_model_dir": f"{monday}/"})
    # The adapter that axolotl loads is the one that is saved.
    IVONLoRAPlugin().register({**given, "lora_r": 8, "lora_model_dir": str(monday)})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ivon_h0": "5e-2", "ivon_prior": "1e-3"},  # YAML reads 5e-2 as a string
        {"adapter": "qlora", "ivon_prior": 0},
        {"streaming": True, "ivon_lambda": 1e7},
        {"weight_decay": 0.0, "loraplus_lr_embedding": 1e-6, "loraplus_lr_ratio": None, "relora": False},
        {"rl": "dpo"},
        {"ivon_eval_samples": 4, "val_set_size": 0.1},
        {"ivon_eval_samples": 4, "test_datasets": [{"path": "x"}]},
        {"ivon_preset": "auto", "ivon_gamma": 10},
        {"learning_rate": 2e-4},
        {"ivon_preset": "auto", "learning_rate": 0.0},  # as it is filled in
        {"ivon_preset": "paper", "learning_rate": 1e-2},
        SERVED,
    ],
)
def test_what_is_right_is_accepted(changes: dict[str, Any]) -> None:
    IVONLoRAPlugin().register({**BASE, **changes})


def test_the_tables_of_keys_are_axolotl_s() -> None:
    fields = AxolotlInputConfig.model_fields
    assert {key for key in fields if key.startswith("lora_")} <= set(LORA_KEYS)
    without = {key: fields[key].default for key in checks._WITHOUT_EFFECT if key in fields and fields[key].default}
    assert without == checks.AXOLOTL_DEFAULTS
