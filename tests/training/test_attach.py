"""attach(): IVON-LoRA in transformers and TRL Trainers, in this process, on the tiny Llama."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trainers import LORA, Rates, lora_weights, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from axolotl_ivon import IVONError, IVONLoRA, Posterior, attach, effective_sample_size


def test_trains_and_saves_sigma_beside_every_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    before = lora_weights(trainer.model)
    attach(trainer, preset="paper", gamma=100.0, clip=0.1)
    trainer.train()
    after = lora_weights(trainer.model)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in after)
    trainer.model.save_pretrained(tmp_path / "final")
    trainer.save_model(str(tmp_path / "by-trainer"))

    optimizer = trainer.optimizer.optimizer
    for folder in ("checkpoint-3", "checkpoint-6", "final", "by-trainer"):
        posterior = Posterior.from_pretrained(tmp_path / folder)
        assert set(posterior.mean) == set(posterior.sigma)
        assert all((sigma > 0).all() for sigma in posterior.sigma.values())
    for name, param in trainer.model.named_parameters():
        if param.requires_grad:
            key = name.replace(".default", "")
            assert torch.equal(posterior.mean[key], param)
            assert torch.equal(posterior.sigma[key], optimizer.sigma(param))
    header = posterior.metadata
    assert header["format"] == "ivon-lora"
    assert float(header["ess"]) == pytest.approx(effective_sample_size(24, 100.0))
    assert (header["gamma"], header["train_size"], header["steps"]) == ("100.0", "24", "6")
    assert (header["h0"], header["clip"], header["prior"]) == ("0.05", "0.1", "empirical")
    assert (header["beta1"], header["beta2"], header["tau"]) == ("0.9", "0.9995", "1.0")
    assert Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata["steps"] == "3"


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [
        ({"use_dora": True}, torch.float32),
        ({"use_rslora": True, "target_modules": "all-linear"}, torch.float32),
        ({"init_lora_weights": "pissa"}, torch.float32),
        ({"target_modules": ["q_proj", "embed_tokens"]}, torch.float32),
        ({"modules_to_save": ["lm_head"]}, torch.float32),
        ({}, torch.bfloat16),
        ({"rank_pattern": {"q_proj": 2}}, torch.float32),
    ],
    ids=["dora", "rslora", "pissa", "embedding", "modules_to_save", "bfloat16", "ranks"],
)
def test_kinds_of_adapters(tiny_llama: Path, tmp_path: Path, lora: dict[str, Any], dtype: torch.dtype) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, lora, max_steps=2, save_steps=2)
    for param in trainer.model.parameters():
        if param.requires_grad:
            param.data = param.data.to(dtype)
    attach(trainer)
    trainer.train()
    posterior = Posterior.from_pretrained(tmp_path / "checkpoint-2")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(int((sigma > 0).sum()) for sigma in posterior.sigma.values()) == trained
    mean = dict(posterior.mean)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "checkpoint-2")
    assert set(loaded.state_dict()) >= set(lora_weights(trainer.model))
    assert {key: value.dtype for key, value in mean.items()} == dict.fromkeys(mean, dtype)


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    for bad in ({"gamma": -1.0}, {"h0": 0.0}, {"prior": "flat"}, {"betas": (0.9, 1.0)}, {"ess": math.inf}):
        with pytest.raises(IVONError, match=next(iter(bad))):
            attach(trainer, **bad)
    trainer.model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(IVONError, match=r"lm_head\.weight is trained but is not part of the adapter"):
        attach(trainer)

    plain = make_trainer(tiny_llama, tmp_path)
    plain.model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(IVONError, match="without a LoRA adapter"):
        attach(plain)

    streamed = make_trainer(tiny_llama, tmp_path)
    streamed.train_dataset = iter(())
    with pytest.raises(IVONError, match="no length"):
        attach(streamed)
    attach(streamed, ess=1e4)

    late = make_trainer(tiny_llama, tmp_path)
    late.create_optimizer()
    with pytest.raises(IVONError, match="already has an optimizer"):
        attach(late)


def test_what_is_no_trainer_or_has_a_weight_decay_is_one_line(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, weight_decay=0.1)
    with pytest.raises(IVONError, match=r"^weight_decay: 0\.1 has no effect .* set it to 0, or prior to a number$"):
        attach(trainer)
    with pytest.raises(IVONError, match=r"^attach\(\) takes a transformers or TRL Trainer, not a PeftModelForCausalLM"):
        attach(trainer.model)
    trainer = make_trainer(tiny_llama, tmp_path)
    trainer.eval_dataset = None
    attach(trainer, eval_samples=4)
    assert "eval_samples 4 has no effect in training" in caplog.text
    caplog.clear()
    attach(make_trainer(tiny_llama, tmp_path), eval_samples=4)
    assert not caplog.records


def test_trl_s_sft_and_dpo_trainers(tiny_llama: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 3e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = Dataset.from_list([{"text": "red dog good"}] * 8)
    pairs = Dataset.from_list([{"prompt": "red", "chosen": " dog", "rejected": " cat"}] * 8)
    trainers = {
        "sft": lambda model: SFTTrainer(
            model,
            SFTConfig(str(tmp_path / "sft"), **common),
            train_dataset=texts,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        ),
        "dpo": lambda model: DPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / "dpo"), **common),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        ),
    }
    for name, make in trainers.items():
        trainer = make(AutoModelForCausalLM.from_pretrained(tiny_llama))
        before = lora_weights(trainer.model)
        attach(trainer, gamma=1.0, clip=0.1)
        trainer.train()
        assert any(not torch.equal(before[key], p) for key, p in lora_weights(trainer.model).items())
        trainer.save_model(str(tmp_path / name / "final"))
        assert Posterior.from_pretrained(tmp_path / name / "final").metadata["train_size"] == "8"


def test_auto_fits_lambda_h0_and_beta2_to_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=100, gradient_accumulation_steps=3)
    trained = lora_weights(trainer.model)
    attach(trainer)
    settings = trainer.posterior_training.settings
    assert settings["ess"] == 250_000
    # σ² = 1/(λ·h0) at the start, to what the matrices' own variance is on average
    noise = sum(1 / (settings["ess"] * settings["h0"]) / p.var() for name, p in trained.items() if "lora_A" in name)
    assert noise == pytest.approx(4 * 4, rel=0.2)
    assert (settings["hessian"], settings["prior_strength"], settings["h0_steps"]) == ("squared_gradients", 0.1, 10)
    trainer.create_optimizer_and_scheduler(100)
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, pytest.approx(1 - 1 / 20))


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": -1, "num_train_epochs": 15},
        {"max_steps": 60, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "num_train_epochs": 1},
    ],
)
def test_few_examples_are_held_less_hot_in_a_long_run(length: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """Fifteen passes over 24 examples, half way from ten to twenty."""
    trainer = make_trainer(tiny_llama, tmp_path, **length)
    attach(trainer)
    before = dict(trainer.posterior_training.settings)
    trainer.create_optimizer_and_scheduler(60)
    (group,) = trainer.optimizer.param_groups
    assert (before["ess"], group["ess"]) == (250_000, 187_500)
    assert group["ess"] * group["h0"] == pytest.approx(before["ess"] * before["h0"])
    twins = [param.detach().clone() for param in group["params"]]
    made = IVONLoRA(twins, **before | {"ess": group["ess"], "h0": group["h0"], "lr": 0.1})
    for param, twin in zip(group["params"], twins, strict=True):
        assert torch.equal(trainer.optimizer.sigma(param), made.sigma(twin))
    again = make_trainer(tiny_llama, tmp_path, **length)
    attach(again, ess=1e4, h0=0.02)
    again.create_optimizer_and_scheduler(60)
    assert (again.optimizer.param_groups[0]["ess"], again.optimizer.param_groups[0]["h0"]) == (1e4, 0.02)


def test_the_paper_is_exact(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    attach(trainer, preset="paper")
    trainer.create_optimizer_and_scheduler(6)
    found = {name: trainer.optimizer.param_groups[0][name] for name in ("lr", "ess", "betas", "h0", "clip", "prior")}
    expected = {"lr": 0.03, "ess": 5000 * math.sqrt(24), "betas": (0.9, 0.9995), "h0": 0.05, "clip": 0.005}
    assert found == {**expected, "prior": "empirical"}
    assert trainer.optimizer.param_groups[0]["hessian"] == "reparameterized"
    assert trainer.optimizer.param_groups[0]["prior_strength"] == 1
    assert trainer.optimizer.param_groups[0]["h0_steps"] is None


@pytest.mark.parametrize(("given", "alpha"), [(2e-4, 0.02), (9.9e-4, 0.099), (1e-3, 1e-3), (0.1, 0.1)])
def test_a_rate_below_1e_3_is_the_most_that_a_step_moves_a_weight(
    given: float, alpha: float, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Rates()
    trainer = make_trainer(
        tiny_llama, tmp_path, learning_rate=given, callbacks=[spy], max_steps=2, lr_scheduler_type="constant"
    )
    before = lora_weights(trainer.model)
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        attach(trainer)
        trainer.train()
    assert spy.rates == [pytest.approx(alpha)] * 2
    moved = max(float((p - before[name]).abs().max()) for name, p in lora_weights(trainer.model).items())
    assert moved <= 2 * alpha * 0.01 * (1 + 1e-3)
    told = [record.message for record in caplog.records if record.message.startswith("preset auto: λ ")]
    assert len(told) == 1
    assert ("is the most that a step may move" in told[0]) is (given < 1e-3)
    assert not [
        record for record in caplog.records if record.levelname == "WARNING" and "learning_rate" in record.message
    ]


def test_what_is_given_goes_before_a_preset(tiny_llama: Path, tmp_path: Path) -> None:
    spy = Rates()
    trainer = make_trainer(tiny_llama, tmp_path, callbacks=[spy], learning_rate=0.0)
    attach(trainer, gamma=7.0, clip=0.02)
    trainer.train()
    assert sum(spy.rates) * 0.02 == pytest.approx(0.125)
    header = Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata
    assert (float(header["ess"]), header["gamma"], header["clip"]) == (7.0 * math.sqrt(24), "7.0", "0.02")


def test_a_rescaled_learning_rate_is_told_in_the_header_and_travels_as_far(tiny_llama: Path, tmp_path: Path) -> None:
    spy = Rates()
    trainer = make_trainer(tiny_llama, tmp_path / "with", callbacks=[spy], learning_rate=0.0)
    attach(trainer, rescale_lr=True, h0=0.1)
    trainer.train()
    assert sum(spy.rates) * 0.01 * 0.1 == pytest.approx(0.125)
    assert Posterior.from_pretrained(tmp_path / "with" / "checkpoint-3").metadata["rescale_lr"] == "true"
    trainer = make_trainer(tiny_llama, tmp_path / "without", max_steps=1, save_steps=1)
    attach(trainer)
    trainer.train()
    assert "rescale_lr" not in Posterior.from_pretrained(tmp_path / "without" / "checkpoint-1").metadata


def test_what_a_preset_cannot_work_with_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(IVONError, match="preset: 'tiny' is unknown; choose one of auto, paper"):
        attach(make_trainer(tiny_llama, tmp_path), preset="tiny")  # type: ignore[arg-type]
    with pytest.raises(IVONError, match="h0 must be positive"):
        attach(make_trainer(tiny_llama, tmp_path), h0=0.0)
    trainer = make_trainer(tiny_llama, tmp_path, learning_rate=0.0)
    with pytest.raises(IVONError, match="clip: inf"):
        attach(trainer, clip=math.inf)
    attach(trainer)  # the refusal left nothing behind
    assert sum("PosteriorTraining" in type(one).__name__ for one in trainer.callback_handler.callbacks) == 1
    trainer = make_trainer(tiny_llama, tmp_path, learning_rate=0.0)
    trainer.create_optimizer()
    trainer.create_scheduler(6)
    trainer.optimizer = None
    with pytest.raises(IVONError, match="no scheduler of your own"):
        attach(trainer)


def test_a_second_attach_is_refused_and_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    attach(trainer, gamma=10.0)
    kind, callbacks = type(trainer), list(trainer.callback_handler.callbacks)
    with pytest.raises(IVONError, match="called on this Trainer already; make a new Trainer"):
        attach(trainer, gamma=20.0)
    assert type(trainer) is kind
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert Posterior.from_pretrained(tmp_path / "checkpoint-6").metadata["gamma"] == "10.0"


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"ess": math.nan}, "ess"),
        ({"h0": -1.0}, "h0"),
        ({"clip": 0.0}, "clip"),
        ({"betas": (1.0, 0.5)}, "betas"),
        ({"prior": -1.0}, "prior"),
        ({"train_size": 0}, "train_size"),
        ({"eval_samples": -1}, "eval_samples"),
        ({"draws": "both"}, "draws"),
        ({"rescale_lr": "yes"}, "rescale_lr"),
        ({"preset": "tiny"}, "preset"),
        ({"clip": math.inf}, "clip"),
        ({"prior_strength": 0.0}, "prior_strength"),
        ({"hessian": "exact"}, "hessian"),
        ({"h0_steps": 0.0}, "h0_steps"),
    ],
)
def test_a_refusal_carries_the_parameter_that_it_is_about(
    settings: dict[str, Any], parameter: str, tiny_llama: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, learning_rate=0.0)
    with pytest.raises(IVONError) as caught:
        attach(trainer, **settings)
    assert caught.value.parameter == parameter
    assert str(caught.value).startswith(parameter)
    assert trainer.args.max_grad_norm == 1.0
    assert type(trainer) is Trainer
