"""What the plugin hands to axolotl and to `attach`, and logs."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from torch.optim.lr_scheduler import OneCycleLR
from trainers import make_trainer

from axolotl_ivon import IVONLoRAPlugin
from axolotl_ivon.integrations.axolotl import ConfigError

BASE = {"optimizer": "ivon_lora", "adapter": "lora", "bf16": False}


def test_an_earlier_adapter_that_attach_refuses_has_a_key(make_adapter: Any, tiny_llama: Path, tmp_path: Path) -> None:
    cfg = DictDefault({**BASE, "learning_rate": 1e-3, "ivon_prior": str(make_adapter(target_modules=["q_proj"]))})
    with pytest.raises(ConfigError, match=r"^ivon_prior: .* is on q_proj and this adapter on q_proj, v_proj; set lora"):
        IVONLoRAPlugin().post_trainer_create(cfg, make_trainer(tiny_llama, tmp_path))
    cfg.ivon_prior, cfg.ivon_prior_strength = str(make_adapter()), 0.5
    trainer = make_trainer(tiny_llama, tmp_path)
    IVONLoRAPlugin().post_trainer_create(cfg, trainer)
    assert trainer.posterior_training.header["prior"] == cfg.ivon_prior
    assert trainer.posterior_training.settings["prior_strength"] == 0.5


@pytest.mark.parametrize(("max_steps", "rate"), [(None, 5.5e-4), (-1, 5.5e-4), (6, 1.1e-3)])
def test_epochs_are_axolotl_s_where_it_counts_the_steps(
    max_steps: int | None, rate: float, tiny_llama: Path, tmp_path: Path
) -> None:
    """As of packed rows, twenty times which 24 examples are seen in the six steps that the Trainer is given."""
    cfg = DictDefault({**BASE, "learning_rate": 0.0, "num_epochs": 20, "max_steps": max_steps})
    trainer = make_trainer(tiny_llama, tmp_path, learning_rate=0.0, max_steps=6)
    IVONLoRAPlugin().post_trainer_create(cfg, trainer)
    trainer.create_optimizer_and_scheduler(6)
    assert trainer.args.learning_rate * 0.01 == pytest.approx(rate)


@pytest.mark.parametrize("beta1", [None, 0.8])
def test_one_cycle_leaves_beta1_as_it_is(beta1: float | None, tiny_llama: Path, tmp_path: Path) -> None:
    """torch's OneCycleLR would otherwise set it anew in every step, and a resumed run would take that for a setting."""
    cfg = DictDefault({**BASE, "learning_rate": 1e-3, "lr_scheduler": "one_cycle", "ivon_beta1": beta1})
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=4)
    IVONLoRAPlugin().post_trainer_create(cfg, trainer)
    optimizer = trainer.create_optimizer()
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=4, **trainer.args.lr_scheduler_kwargs)
    for _ in range(3):
        schedule.step()
        assert optimizer.param_groups[0]["betas"][0] == (beta1 or 0.9)


@pytest.mark.parametrize("rl", ["dpo", None])
def test_the_base_model_saves_its_adapter_where_axolotl_has_no_other(
    rl: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=1)
    IVONLoRAPlugin().post_trainer_create(DictDefault({**BASE, "learning_rate": 1e-3, "rl": rl}), trainer)
    trainer.train()
    base = trainer.model.get_base_model()
    base.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert (tmp_path / "saved" / "ivon_sigma.safetensors").exists() == bool(rl)
    assert (tmp_path / "saved" / "model.safetensors").exists() == (not rl)
    # What has no adapter is the base model again: a copy, and the model that the adapter is merged into.
    copy.deepcopy(trainer.model).merge_and_unload().save_pretrained(tmp_path / "copy")
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("copy", "merged"):
        assert (tmp_path / name / "model.safetensors").exists()
        assert not (tmp_path / name / "adapter_model.safetensors").exists()


def test_the_library_logs_at_axolotl_s_level() -> None:
    ours = logging.getLogger("axolotl_ivon")
    ours.setLevel(logging.NOTSET)
    IVONLoRAPlugin().register(dict(BASE))
    assert ours.level == logging.getLogger("axolotl").getEffectiveLevel()


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
