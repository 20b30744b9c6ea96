"""The plugin in real `axolotl` processes, on a tiny Llama; and every refusal of the YAML."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from runs import ROWS, axolotl, trained
from safetensors.torch import load_file
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONLoRAPlugin, Posterior
from axolotl_ivon.plugin import ConfigError


@pytest.fixture(scope="module")
def straight_run(make_config: Any) -> Path:
    """Six steps of two micro-batches, with a checkpoint after three."""
    config = make_config("straight", ivon_clip="1e-2")
    trained(config)
    return config.with_suffix("")


def test_one_yaml_line_gives_a_posterior_beside_the_adapter(straight_run: Path, tiny_llama: Path) -> None:
    for folder in (straight_run, straight_run / "checkpoint-3", straight_run / "checkpoint-6"):
        posterior = Posterior.from_pretrained(folder)
        assert set(posterior.mean) == set(posterior.sigma)
        assert all((sigma > 0).all() for sigma in posterior.sigma.values())
    header = Posterior.from_pretrained(straight_run).metadata
    assert (header["gamma"], header["h0"], header["clip"]) == ("5000.0", "0.05", "0.01")
    assert (header["train_size"], header["steps"], header["prior"]) == (str(ROWS), "6", "empirical")
    assert float(header["ess"]) == pytest.approx(5000 * math.sqrt(ROWS))
    start = Posterior.from_pretrained(straight_run / "checkpoint-3").mean
    end = Posterior.from_pretrained(straight_run).mean
    assert any(not torch.equal(start[key], end[key]) for key in end)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), straight_run)
    weights = model.state_dict()
    for key, tensor in load_file(straight_run / "adapter_model.safetensors").items():
        assert torch.equal(weights[key.replace(".weight", ".default.weight")], tensor)


def test_the_log_of_a_real_run_shows_the_posterior(straight_run: Path) -> None:
    state = json.loads((straight_run / "checkpoint-6" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        assert {key for key in entry if "ivon" in key} == {"ivon_sigma_mean", "ivon_snr_mean", "ivon_ess"}


def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(straight_run: Path, make_config: Any) -> None:
    config = make_config("resumed", ivon_clip="1e-2", resume_from_checkpoint=str(straight_run / "checkpoint-3"))
    trained(config)
    for name in ("adapter_model.safetensors", "ivon_sigma.safetensors"):
        left, right = load_file(straight_run / name), load_file(config.with_suffix("") / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_sigint_in_mid_step_saves_the_mean_and_its_sigma(straight_run: Path, make_config: Any) -> None:
    config = make_config(
        "interrupted",
        ivon_clip="1e-2",
        save_steps=2,  # the interrupt comes in the third step, so checkpoint-2 holds the mean of that moment
        plugins=["axolotl_ivon.IVONLoRAPlugin", "axolotl_helpers.InterruptInForward"],
    )
    result = axolotl("train", config, "--launcher", "python", cwd=config.parent)
    output = config.with_suffix("")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (output / "checkpoint-4").exists(), "it was not interrupted"
    drawn = torch.load(output / "drawn.pt", weights_only=True)
    saved, checkpoint = Posterior.from_pretrained(output), Posterior.from_pretrained(output / "checkpoint-2")
    for name, draw in drawn.items():
        key = name.replace(".default", "")
        assert torch.equal(saved.mean[key], checkpoint.mean[key])
        assert torch.equal(saved.sigma[key], checkpoint.sigma[key])
        assert not torch.equal(saved.mean[key], draw)


def test_the_preset_for_small_data_sets_lambda_clip_and_learning_rate(make_config: Any) -> None:
    config = make_config("small", ivon_preset="small_data", learning_rate=None, warmup_steps=2, lr_scheduler="cosine")
    result = trained(config)
    header = Posterior.from_pretrained(config.with_suffix("")).metadata
    assert (header["gamma"], header["clip"], float(header["ess"])) == ("", "0.01", 10 * ROWS)
    state = json.loads((config.with_suffix("") / "checkpoint-6" / "trainer_state.json").read_text())
    # The last step's rate is that of 3/4 of a half cosine over the four steps after the warmup.
    peak = 0.125 / 0.01 / (0 + 0.5 + sum((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)))
    logged = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert logged[-1] == pytest.approx(peak * (1 + math.cos(math.pi * 3 / 4)) / 2)
    assert f"learning_rate {peak:.3g} for these 6 steps" in result.stdout + result.stderr


def test_another_optimizer_is_left_alone(straight_run: Path, make_config: Any) -> None:
    outputs = []
    start = str(straight_run / "checkpoint-3")  # axolotl does not seed the initialization of a new adapter
    for name, plugins in (("with", ["axolotl_ivon.IVONLoRAPlugin"]), ("without", None)):
        config = make_config(
            f"adamw-{name}", optimizer="adamw_torch", learning_rate=2e-4, plugins=plugins, lora_model_dir=start
        )
        trained(config)
        outputs.append(config.with_suffix(""))
        assert not list(config.with_suffix("").rglob("ivon_sigma*"))
    left, right = (load_file(output / "adapter_model.safetensors") for output in outputs)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_other_commands_accept_the_yaml(straight_run: Path, make_config: Any) -> None:
    config = make_config("others", ivon_clip="1e-2", val_set_size=0.2, lora_model_dir=str(straight_run))
    here = config.parent
    for command in (
        ["preprocess", config],
        ["evaluate", config, "--launcher", "python"],
        ["merge-lora", config],
    ):
        result = axolotl(*command, cwd=here)
        assert result.returncode == 0, (command, result.stderr[-3000:])
    merged = AutoModelForCausalLM.from_pretrained(here / "others" / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    result = axolotl("inference", config, "--launcher", "python", cwd=here, stdin="red dog")
    assert "Give me an instruction" in result.stdout, result.stderr[-3000:]
    assert "red dog" in result.stdout


def test_a_refused_yaml_is_one_line_and_leaves_nothing(make_config: Any) -> None:
    config = make_config("refused", ivon_h0=-1)
    result = axolotl("train", config, "--launcher", "python", cwd=config.parent)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.strip().splitlines()[-1] == ("axolotl-ivon: ivon_h0: -1 is refused, it must be greater than 0")
    assert not config.with_suffix("").exists()


BASE = {"optimizer": "ivon_lora", "adapter": "lora"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ivon_preset": "tiny"}, ["ivon_preset", "'tiny'", "'paper' or 'small_data'"]),
        ({"ivon_preset": "small_data", "learning_rate": 1e-2}, ["learning_rate: 0.01", "ivon_preset", "remove"]),
        ({"ivon_gamma": 0}, ["ivon_gamma", "0", "greater than 0"]),
        ({"ivon_gamma": float("inf")}, ["ivon_gamma", "inf", "finite"]),
        ({"ivon_lambda": -1e7}, ["ivon_lambda", "-10000000.0", "greater than 0"]),
        ({"ivon_h0": "small"}, ["ivon_h0", "'small'", "number"]),
        ({"ivon_clip": 0.0}, ["ivon_clip", "0.0", "greater than 0"]),
        ({"ivon_beta1": 1}, ["ivon_beta1", "1", "less than 1"]),
        ({"ivon_beta2": -0.1}, ["ivon_beta2", "-0.1", "greater than or equal to 0"]),
        ({"ivon_prior": "flat"}, ["ivon_prior", "'flat'", "'empirical'", "number"]),
        ({"ivon_prior": -1.0}, ["ivon_prior", "-1.0", "greater than or equal to 0"]),
        ({"ivon_gama": 1}, ["ivon_gama", "ivon_gamma"]),
        ({"ivon_weight_prior": 1}, ["ivon_weight_prior", "ivon_prior"]),
        ({"ivon_gamma": 1, "ivon_lambda": 1e7}, ["ivon_gamma", "ivon_lambda", "remove one"]),
        ({"adapter": None}, ["adapter", "None", "lora or qlora"]),
        ({"adapter": "llama-adapter"}, ["adapter", "llama-adapter", "lora or qlora"]),
        ({"streaming": True}, ["streaming", "ivon_lambda"]),
        ({"pretraining_dataset": "x"}, ["pretraining_dataset", "ivon_lambda"]),
        ({"loraplus_lr_ratio": 16}, ["loraplus_lr_ratio", "16", "remove"]),
        ({"loraplus_lr_embedding": 1e-5}, ["loraplus_lr_embedding", "remove"]),
        ({"lr_groups": [{"name": "a"}]}, ["lr_groups", "remove"]),
        ({"embedding_lr": 1e-5}, ["embedding_lr", "1e-05", "remove"]),
        ({"embedding_lr_scale": 0.5}, ["embedding_lr_scale", "0.5", "remove"]),
        ({"weight_decay": 0.1}, ["weight_decay", "0.1", "ivon_prior"]),
        ({"weight_decay": 0.1, "ivon_prior": 0.1}, ["weight_decay", "0.1", "remove"]),
        ({"relora": True}, ["relora", "remove"]),
        ({"lisa_n_layers": 4}, ["lisa_n_layers", "remove"]),
        ({"optim_target_modules": ["q_proj"]}, ["optim_target_modules", "GaLore"]),
        ({"optim_args": {"a": 1}}, ["optim_args", "ivon_"]),
        ({"adam_beta2": 0.99}, ["adam_beta2", "ivon_beta2"]),
        ({"unfrozen_parameters": ["x"]}, ["unfrozen_parameters", "remove"]),
        ({"rl": "grpo"}, ["rl", "grpo"]),
        ({"rl": "dpo", "ivon_eval_samples": 4}, ["ivon_eval_samples", "rl"]),
        ({"ivon_eval_samples": 2.5}, ["ivon_eval_samples", "2.5", "integer"]),
    ],
)
def test_what_would_be_ignored_or_is_out_of_range_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        IVONLoRAPlugin().register({**BASE, **changes})
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    IVONLoRAPlugin().register({**BASE, **changes, "optimizer": "adamw_torch"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ivon_beta2": 1.5}, r"ivon_beta1 and ivon_beta2 must be two numbers in \[0, 1\)"),
        ({"ivon_lambda": math.nan}, "ivon_lambda must be"),
        ({"ivon_preset": "small_data", "ivon_clip": math.inf}, "ivon_clip: inf has no learning rate"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"ivon_lambda": None}, "give ivon_lambda"),
    ],
)
def test_what_attach_refuses_is_told_by_its_key(
    changes: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
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
        {"ivon_preset": "small_data", "ivon_gamma": 10},
        {"ivon_preset": "small_data", "learning_rate": 0.0},  # as it is filled in
        {"ivon_preset": "paper", "learning_rate": 1e-2},
    ],
)
def test_what_is_right_is_accepted(changes: dict[str, Any]) -> None:
    IVONLoRAPlugin().register({**BASE, **changes})


def test_the_schema_has_types_ranges_and_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that axolotl validates a YAML with, made of its own and every plugin's."""
    from collections import OrderedDict

    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    plugins = OrderedDict({"axolotl_ivon.IVONLoRAPlugin": IVONLoRAPlugin()})
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", plugins)
    _, merged = merge_input_args()
    from axolotl_ivon.args import DEFAULTS, IVONArgs

    properties = IVONArgs.model_json_schema()["properties"]
    assert set(merged.model_fields) > set(properties) == {*DEFAULTS, "ivon_lambda"}
    for name, entry in properties.items():
        assert "IVON-LoRA" in entry["description"]
        kinds = {kind.get("type") for kind in entry["anyOf"]}
        assert kinds & {"number", "integer"} or any("enum" in kind for kind in entry["anyOf"]), name
    gamma = next(kind for kind in properties["ivon_gamma"]["anyOf"] if kind["type"] == "number")
    assert gamma["exclusiveMinimum"] == 0
    assert "5000" in properties["ivon_gamma"]["description"]


def test_ivon_post_is_a_command_of_axolotl(straight_run: Path) -> None:
    result = axolotl("ivon-post", "info", straight_run, "--json", cwd=straight_run.parent)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout[result.stdout.index("{") :])["weights"] > 0  # axolotl 0.21 begins with a banner
