"""What the plugin refuses in a YAML, and the schema that it hands to axolotl."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from trainers import make_trainer

from axolotl_ivon import IVONLoRAPlugin
from axolotl_ivon.integrations.axolotl import ConfigError

BASE = {"optimizer": "ivon_lora", "adapter": "lora"}
DRAWS = {"rl": "grpo", "ivon_rollouts": "draws", "ivon_rollout_draws": 2}
USELESS = ["loraplus_lr_ratio", "loraplus_lr_embedding", "lr_groups", "embedding_lr", "embedding_lr_scale", "relora"]
USELESS += ["lisa_n_layers", "optim_target_modules", "unfrozen_parameters", "adam_epsilon"]


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
        ({"ivon_gama": 1}, ["ivon_gama", "ivon_gamma"]),
        ({"ivon_weight_prior": 1}, ["ivon_weight_prior", "ivon_prior"]),
        ({"ivon_gamma": 1, "ivon_lambda": 1e7}, ["ivon_gamma", "ivon_lambda", "remove one"]),
        ({"adapter": None}, ["adapter", "None", "lora or qlora"]),
        ({"adapter": "llama-adapter"}, ["adapter", "llama-adapter", "lora or qlora"]),
        ({"streaming": True}, ["streaming", "ivon_lambda"]),
        ({"pretraining_dataset": "x"}, ["pretraining_dataset", "ivon_lambda"]),
        *(({key: 0.5}, [key, "0.5 has no effect", "remove it"]) for key in USELESS),
        ({"weight_decay": 0.1}, ["weight_decay", "0.1", "ivon_prior"]),
        ({"weight_decay": 0.1, "ivon_prior": 0.1}, ["weight_decay", "0.1", "remove"]),
        ({"optim_args": {"a": 1}}, ["optim_args", "ivon_"]),
        ({"adam_beta2": 0.99}, ["adam_beta2", "ivon_beta2"]),
        ({"rl": "ebft"}, ["rl: ebft", "rl: grpo"]),
        ({**DRAWS, "rl": "dpo"}, ["ivon_rollouts: draws is for GRPO"]),
        ({**DRAWS, "ivon_rollout_draws": 3}, ["ivon_rollout_draws: 3 does not divide num_generations: 8"]),
        (DRAWS, ["ivon_rollout_draws: 2 does not divide gradient_accumulation_steps: 1"]),
        ({**DRAWS, "trl": {"num_generations": 1}}, ["ivon_rollout_draws: 2 does not divide num_generations: 1"]),
        ({**DRAWS, "trl": {"use_vllm": True}}, ["ivon_rollouts: draws does not go with trl.use_vllm: true unless"]),
        ({"ivon_rollouts": "both"}, ["ivon_rollouts", "'both'", "'mean' or 'draws'"]),
        ({"rl": "dpo", "ivon_eval_samples": 4, "val_set_size": 1}, ["ivon_eval_samples", "rl"]),
        ({"ivon_eval_samples": 4}, ["ivon_eval_samples: 4", "val_set_size", "test_datasets"]),
        ({"ivon_eval_samples": 2.5}, ["ivon_eval_samples", "2.5", "integer"]),
        ({"ivon_rescale_lr": "maybe"}, ["ivon_rescale_lr", "'maybe'", "boolean"]),
    ],
)
def test_what_would_be_ignored_or_is_out_of_range_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        IVONLoRAPlugin().register({**BASE, **changes})
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    IVONLoRAPlugin().register({**BASE, **changes, "optimizer": "adamw_torch"})


def test_an_earlier_adapter_unlike_the_yaml_is_refused(make_adapter: Any, copied: Any, tmp_path: Path) -> None:
    monday, other, plain = make_adapter(seed=1), make_adapter(seed=2), make_adapter(sigma=False)
    given = {**BASE, "ivon_prior": str(monday)}
    for changes, words in (
        ({"lora_model_dir": str(other)}, f"ivon_prior: {monday} is not lora_model_dir: {other}; name the same adapter"),
        ({"lora_r": 8}, f"ivon_prior: {monday} has r 4 and this adapter 8; set lora_r: 4"),
        ({"lora_r": 4, "lora_alpha": 16}, "has lora_alpha 8 and this adapter 16; set lora_alpha: 8"),
        ({"output_dir": f"{monday}/."}, f"ivon_prior: {monday} is output_dir as well, and would be overwritten"),
        ({"ivon_h0": 0.1}, f"ivon_h0: 0.1 has no effect with ivon_prior: {monday}"),
        ({"ivon_rescale_lr": True}, "ivon_rescale_lr: true does not go with ivon_prior"),
        ({"ivon_prior": str(plain)}, f"ivon_prior: {plain} has no σ, so it is no posterior"),
        ({"ivon_prior": str(make_adapter(facts={"tau": "inf"}))}, "has tau inf, so it has no width"),
        ({"ivon_prior": str(make_adapter(facts={"pruned_ratio": "0.1"}))}, "is pruned"),
    ):
        with pytest.raises(ConfigError) as error:
            IVONLoRAPlugin().register({**given, **changes})
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    IVONLoRAPlugin().register(given)
    IVONLoRAPlugin().register({**given, "lora_r": 4, "lora_alpha": 8, "lora_model_dir": f"{monday}/"})
    # The adapter that axolotl loads is the one that is saved.
    IVONLoRAPlugin().register({**given, "lora_r": 8, "lora_model_dir": str(monday)})


def test_an_earlier_adapter_that_attach_refuses_has_a_key(make_adapter: Any, tiny_llama: Path, tmp_path: Path) -> None:
    cfg = DictDefault({**BASE, "learning_rate": 1e-3, "ivon_prior": str(make_adapter(target_modules=["q_proj"]))})
    with pytest.raises(ConfigError, match=r"^ivon_prior: .* is on q_proj and this adapter on q_proj, v_proj; set lora"):
        IVONLoRAPlugin().post_trainer_create(cfg, make_trainer(tiny_llama, tmp_path))
    cfg.ivon_prior, cfg.ivon_prior_strength = str(make_adapter()), 0.5
    trainer = make_trainer(tiny_llama, tmp_path)
    IVONLoRAPlugin().post_trainer_create(cfg, trainer)
    assert trainer.posterior_training.header["prior"] == cfg.ivon_prior
    assert trainer.posterior_training.settings["prior_strength"] == 0.5


def test_the_library_logs_at_axolotl_s_level() -> None:
    ours, before = logging.getLogger("axolotl_ivon"), logging.getLogger("axolotl_ivon").level
    ours.setLevel(logging.NOTSET)
    try:
        IVONLoRAPlugin().register(dict(BASE))
        assert ours.level == logging.getLogger("axolotl").getEffectiveLevel()
    finally:
        ours.setLevel(before)


def test_keys_with_another_optimizer_are_named(caplog: pytest.LogCaptureFixture) -> None:
    IVONLoRAPlugin().register({**BASE, "optimizer": "adamw_torch", "ivon_h0": 0.1, "ivon_gama": 1, "ivon_clip": None})
    (record,) = caplog.records
    assert record.getMessage() == (
        "ivon_h0, ivon_gama: no effect with optimizer: adamw_torch, only with optimizer: ivon_lora"
    )
    caplog.clear()
    IVONLoRAPlugin().register({"adapter": "lora", "ivon_h0": 0.1})
    assert "no effect with the default optimizer" in caplog.text
    caplog.clear()
    IVONLoRAPlugin().register({**BASE, "optimizer": "adamw_torch"})
    IVONLoRAPlugin().register({**BASE, "ivon_h0": 0.1})
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ivon_beta2": 1.5}, r"ivon_beta1 and ivon_beta2 must be two numbers in \[0, 1\)"),
        ({"ivon_lambda": math.nan}, "ivon_lambda must be"),
        ({"learning_rate": 0.0, "ivon_clip": math.inf}, "ivon_clip: inf bounds no step"),
        ({"learning_rate": 0.03}, "learning_rate: 0.03 is too far for a step, .* or set ivon_preset to paper"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"ivon_lambda": None}, "give ivon_lambda"),
    ],
)
def test_what_attach_refuses_has_a_key(changes: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    cfg = DictDefault({**BASE, "learning_rate": 1e-2, "ivon_lambda": 1e4, **changes})
    trainer = make_trainer(tiny_llama, tmp_path, learning_rate=cfg.learning_rate)
    if cfg.ivon_lambda is None:
        trainer.train_dataset = iter(())  # streamed data
    with pytest.raises(ConfigError, match=message):
        IVONLoRAPlugin().post_trainer_create(cfg, trainer)


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
    ],
)
def test_what_is_right_is_accepted(changes: dict[str, Any]) -> None:
    IVONLoRAPlugin().register({**BASE, **changes})


def test_the_schema_has_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that axolotl validates a YAML with, made of its own and every plugin's."""
    from collections import OrderedDict

    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    plugins = OrderedDict({"axolotl_ivon.IVONLoRAPlugin": IVONLoRAPlugin()})
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", plugins)
    _, merged = merge_input_args()
    from axolotl_ivon.args import IVONArgs

    properties = IVONArgs.model_json_schema()["properties"]
    assert set(merged.model_fields) > set(properties)
    for name, entry in properties.items():
        kinds = {kind.get("type") for kind in entry["anyOf"]}
        assert kinds & {"number", "integer", "boolean"} or any("enum" in kind for kind in entry["anyOf"]), name
