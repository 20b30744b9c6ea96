"""attach(): IVON-LoRA in transformers and TRL Trainers, in this process, on the tiny Llama."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from trainers import IVON_METRICS, LORA, Rates, as_saved, lora_weights, same
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from axolotl_ivon import IVONError, IVONLoRA, Posterior, attach, effective_sample_size


def test_trains_and_saves_sigma_beside_every_adapter(attached: Any, tmp_path: Path) -> None:
    trainer = attached({"preset": "paper", "gamma": 100.0, "clip": 0.1})
    before = lora_weights(trainer.model)
    trainer.train()
    after = lora_weights(trainer.model)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in after)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [{key for key in entry if key.startswith("ivon_")} for entry in entries] == [IVON_METRICS] * 3
    assert all(entry["ivon_sigma_mean"] > 0 for entry in entries)
    assert entries[-1]["ivon_ess"] == pytest.approx(effective_sample_size(24, 100.0))
    trainer.model.save_pretrained(tmp_path / "final")
    trainer.save_model(str(tmp_path / "by-trainer"))

    optimizer = trainer.optimizer.optimizer
    for folder in ("checkpoint-3", "checkpoint-6", "final", "by-trainer"):
        posterior = Posterior.from_pretrained(tmp_path / folder)
        assert set(posterior.mean) == set(posterior.sigma)
        assert all((sigma > 0).all() for sigma in posterior.sigma.values())
    params = trainer.posterior_training.params
    assert same(posterior.mean, as_saved(params))
    assert same(posterior.sigma, as_saved({name: optimizer.sigma(param) for name, param in params.items()}))
    header = posterior.metadata
    assert float(header["ess"]) == pytest.approx(effective_sample_size(24, 100.0))
    expected = {"format": "ivon-lora", "gamma": "100.0", "train_size": "24", "steps": "6", "h0": "0.05", "clip": "0.1"}
    expected |= {"prior": "empirical", "beta1": "0.9", "beta2": "0.9995", "tau": "1.0"}
    assert header.items() >= expected.items()
    assert Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata["steps"] == "3"


def test_a_trainer_that_cannot_be_attached_to_is_refused(made: Any, tiny_llama: Path, caplog: Any) -> None:
    trainer = made()
    trainer.model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(IVONError, match=r"lm_head\.weight is trained but is not part of the adapter"):
        attach(trainer)
    with pytest.raises(IVONError, match=r"^attach\(\) takes a transformers or TRL Trainer, not a PeftModelForCausalLM"):
        attach(trainer.model)
    trainer.model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(IVONError, match="without a LoRA adapter"):
        attach(trainer)
    for kind, config in (("PROMPT", PromptTuningConfig), ("PREFIX", PrefixTuningConfig)):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        trainer.model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(IVONError, match=rf"^the adapter is of type {kind}_TUNING, .*: train a LoRA adapter$"):
            attach(trainer)
    other = made()
    with pytest.raises(IVONError, match=r"^model_init makes another model when training begins: give the "):
        attach(Trainer(args=other.args, model_init=lambda: other.model, train_dataset=other.train_dataset))
    streamed = made()
    streamed.train_dataset = iter(())
    with pytest.raises(IVONError, match="no length"):
        attach(streamed)
    attach(streamed, ess=1e4)
    late = made(learning_rate=0.0)
    late.create_optimizer_and_scheduler(6)
    with pytest.raises(IVONError, match="already has an optimizer"):
        attach(late)
    late.optimizer = None
    with pytest.raises(IVONError, match="no scheduler of your own"):  # the preset chooses the rate
        attach(late)
    with pytest.raises(IVONError, match=r"^weight_decay: 0\.1 has no effect .* set it to 0, or prior to a number$"):
        attach(made(weight_decay=0.1))
    for without in (True, False):
        trainer = made()
        trainer.eval_dataset = None if without else trainer.eval_dataset
        caplog.clear()
        attach(trainer, eval_samples=4)
        assert ("eval_samples 4 has no effect in training" in caplog.text) is without


WRONG: dict[str, Any] = {"gamma": 0.0, "ess": math.nan, "h0": -1.0, "clip": 0.0, "betas": (1.0, 0.5), "prior": -1.0}
WRONG |= {"train_size": 0, "eval_samples": -1, "draws": "both", "rescale_lr": "yes", "preset": "tiny"}
WRONG |= {"prior_strength": 0.0, "hessian": "exact", "direction": "down", "h0_steps": 0.0}
WRONG_TOO = [("clip", math.inf), ("clip", "0.01"), ("h0", 1e30), ("prior_strength", 1e300), ("prior", None)]
WRONG_TOO += [("prior", True), ("eval_samples", "2"), ("eval_samples", 2.5), ("calibrate", "no")]


# An infinite clip is wrong without a learning rate.
@pytest.mark.parametrize(("parameter", "value"), [*WRONG.items(), *WRONG_TOO])
def test_a_wrong_value_is_refused_by_its_parameter_and_leaves_nothing(parameter: str, value: Any, made: Any) -> None:
    trainer = made(learning_rate=0.0)
    with pytest.raises(IVONError) as caught:
        attach(trainer, **{parameter: value})
    assert caught.value.parameter == parameter
    attach(trainer)
    assert sum("PosteriorTraining" in type(one).__name__ for one in trainer.callback_handler.callbacks) == 1


def test_lambda_is_given_once_and_a_number_as_prior_is_its_delta(made: Any) -> None:
    with pytest.raises(IVONError, match=r"^gamma and ess are both given: λ is γ·√N or ess, remove one$"):
        attach(made(), gamma=5.0, ess=1e5)
    with pytest.raises(IVONError, match=r"^betas: \(0.9,\) is no pair; give \(β1, β2\)"):
        attach(made(), betas=(0.9,))
    with pytest.raises(IVONError, match=r"^train_size: 1.5 is no whole number of training examples$"):
        attach(made(), train_size=1.5)
    for settings, strength in (({}, 1), ({"prior_strength": 0.1}, 0.1), ({"preset": "paper"}, 1)):
        trainer = made()
        attach(trainer, prior=1e-3, **settings)
        optimizer = trainer.create_optimizer()
        assert optimizer.param_groups[0]["prior"] * optimizer.param_groups[0]["prior_strength"] == 1e-3 * strength


def test_a_second_attach_is_refused_and_changes_nothing(attached: Any, tmp_path: Path) -> None:
    trainer = attached({"gamma": 10.0})
    kind, callbacks = type(trainer), list(trainer.callback_handler.callbacks)
    with pytest.raises(IVONError, match="called on this Trainer already; make a new Trainer"):
        attach(trainer, gamma=20.0)
    assert type(trainer) is kind
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert Posterior.from_pretrained(tmp_path / "checkpoint-6").metadata["gamma"] == "10.0"


def test_what_vera_shares_between_its_layers_is_saved_and_not_trained(
    made: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    trainer, vera = made(), VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    trainer.model = trainer.model_wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), vera)
    attach(trainer)
    trainer.train()
    posterior = Posterior.from_pretrained(tmp_path / "checkpoint-6")
    shared = {"base_model.vera_A", "base_model.vera_B"}
    assert {key for key, sigma in posterior.sigma.items() if not (sigma > 0).all()} == shared < set(posterior.mean)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_s_trainers(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    import trl

    args = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 3e-4, "save_strategy": "no"}
    args |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    row = {"SFT": {"text": "red dog good"}, "DPO": {"prompt": "red", "chosen": " dog", "rejected": " cat"}}[kind]
    tokenizer = {"processing_class": AutoTokenizer.from_pretrained(tiny_llama)} if kind == "SFT" else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=getattr(trl, f"{kind}Config")(str(tmp_path), **args),
        train_dataset=Dataset.from_list([row] * 8),
        peft_config=LoraConfig(**LORA),
        **tokenizer,
    )
    before = lora_weights(trainer.model)
    attach(trainer, gamma=1.0, clip=0.1)
    trainer.train()
    assert not same(before, lora_weights(trainer.model))
    trainer.save_model(str(tmp_path / "final"))
    assert Posterior.from_pretrained(tmp_path / "final").metadata["train_size"] == "8"


def test_auto_fits_lambda_h0_and_beta2_to_the_run(attached: Any) -> None:
    trainer = attached(max_steps=100, gradient_accumulation_steps=3)
    settings = trainer.posterior_training.settings
    assert settings["ess"] == 250_000
    # σ² = 1/(λ·h0) at the start, to what the matrices' own variance is on average
    matrices = [p for name, p in lora_weights(trainer.model).items() if "lora_A" in name]
    noise = sum(1 / (settings["ess"] * settings["h0"]) / p.var() for p in matrices)
    assert noise == pytest.approx(4 * 4, rel=0.2)
    assert (settings["hessian"], settings["prior_strength"], settings["h0_steps"]) == ("squared_gradients", 0.1, 10)
    for direction, memory in (("newton", 20), ("adam", 100)):
        trainer = attached({"direction": direction}, max_steps=100)
        trainer.create_optimizer_and_scheduler(100)
        assert trainer.optimizer.param_groups[0]["betas"] == (0.9, pytest.approx(1 - 1 / memory))


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": -1, "num_train_epochs": 15},
        {"max_steps": 60, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "num_train_epochs": 1},
    ],
)
def test_few_examples_are_held_less_hot_in_a_long_run(length: dict[str, Any], attached: Any) -> None:
    """Fifteen passes over 24 examples, half way from ten to twenty."""
    trainer = attached(**length)
    before = dict(trainer.posterior_training.settings)
    trainer.create_optimizer_and_scheduler(60)
    (group,) = trainer.optimizer.param_groups
    assert (before["ess"], group["ess"]) == (250_000, 187_500)
    assert group["ess"] * group["h0"] == pytest.approx(before["ess"] * before["h0"])
    twins = [param.detach().clone() for param in group["params"]]
    fitted = {name: group[name] for name in ("ess", "h0", "direction", "tau")}
    made = IVONLoRA(twins, **before | fitted | {"lr": 0.1})
    for param, twin in zip(group["params"], twins, strict=True):
        assert torch.equal(trainer.optimizer.sigma(param), made.sigma(twin))
    again = attached({"ess": 1e4, "h0": 0.02}, **length)
    again.create_optimizer_and_scheduler(60)
    assert (again.optimizer.param_groups[0]["ess"], again.optimizer.param_groups[0]["h0"]) == (1e4, 0.02)


def test_the_paper_is_exact(attached: Any) -> None:
    trainer = attached({"preset": "paper"})
    trainer.create_optimizer_and_scheduler(6)
    stated = {"lr": 0.03, "ess": 5000 * math.sqrt(24), "betas": (0.9, 0.9995), "h0": 0.05, "clip": 0.005}
    stated |= {"prior": "empirical", "hessian": "reparameterized", "prior_strength": 1, "h0_steps": None}
    assert trainer.optimizer.param_groups[0].items() >= stated.items()


@pytest.mark.parametrize("clip", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("given", [2e-4, 9.9e-4, 1e-3, 2e-3, 0.01])
def test_the_learning_rate_is_the_most_that_a_step_moves_a_weight(
    given: float, clip: float, attached: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Rates()
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        trainer = attached(
            {"clip": clip}, learning_rate=given, callbacks=[spy], max_steps=2, lr_scheduler_type="constant"
        )
        before = lora_weights(trainer.model)
        trainer.train()
    assert spy.rates == [pytest.approx(given / clip)] * 2
    moved = max(float((p - before[name]).abs().max()) for name, p in lora_weights(trainer.model).items())
    assert moved <= 2 * given * (1 + 1e-3)
    if clip == 0.01:  # nearly every step is cut at the bound
        assert moved >= given
    (line,) = (record.message for record in caplog.records if record.message.startswith("preset auto: λ "))
    assert "a step moves a weight by at most the learning_rate" in line
    assert ("next to nothing can be learned" in caplog.text) is (2 * given < 1e-3)


def test_by_auto_what_leaves_a_step_without_that_bound_is_refused(made: Any) -> None:
    paper = "or set preset to paper, where learning_rate is α$"
    for settings, rate, words in (
        ({}, 0.03, f"^learning_rate: 0.03 is too far for a step.*, such as 2e-4, {paper}"),
        ({"rescale_lr": True}, 2e-4, f"^rescale_lr: true leaves a step no bound.*{paper}"),
        ({"clip": math.inf}, 2e-4, f"^clip: inf bounds no step.*{paper}"),
    ):
        with pytest.raises(IVONError, match=words):
            attach(made(learning_rate=rate), **settings)
        attach(trainer := made(learning_rate=rate), preset="paper", **settings)
        assert trainer.args.learning_rate == rate


def test_arguments_can_be_used_for_a_second_trainer(made: Any) -> None:
    first = made(learning_rate=2e-4, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5})
    second, args = made(), first.args
    second.args = args
    for trainer in (first, second):
        attach(trainer)
        assert trainer.args.learning_rate == pytest.approx(0.02)
        assert trainer.args.lr_scheduler_kwargs == {"min_lr": pytest.approx(1e-3)}
    assert (args.learning_rate, args.lr_scheduler_kwargs, args.max_grad_norm) == (2e-4, {"min_lr": 1e-5}, 1.0)


@pytest.mark.parametrize(
    ("settings", "rate", "step_bound", "kept"),
    [
        ({"gamma": 7.0, "clip": 0.02}, 1.1e-3, 0.02, {"ess": str(7.0 * math.sqrt(24)), "gamma": "7.0", "clip": "0.02"}),
        ({"rescale_lr": True, "h0": 0.1}, 2.5e-4, 0.01 * 0.1, {"rescale_lr": "true", "h0": "0.1"}),
    ],
)
def test_what_is_given_goes_before_a_preset_and_no_step_is_longer_than_usual(
    settings: dict[str, Any], rate: float, step_bound: float, kept: dict[str, str], trained: Any, tmp_path: Path
) -> None:
    spy = Rates()
    trained(settings, callbacks=[spy], learning_rate=0.0)
    assert max(spy.rates) * step_bound == pytest.approx(rate)
    header = Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata
    assert header.items() >= kept.items()
    assert ("rescale_lr" in header) is ("rescale_lr" in settings)
