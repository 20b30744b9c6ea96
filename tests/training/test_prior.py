"""Finetuning again from an earlier posterior: what is started from, what is refused, and what the headers tell."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from trainers import as_saved, lora_weights, make_trainer, same
from transformers import AutoModelForCausalLM, TrainerCallback

from axolotl_ivon import IVONError, Posterior, attach
from axolotl_ivon.inspect.diagnosis import diagnose
from axolotl_ivon.posterior.chain import links


@pytest.fixture(scope="module")
def monday(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with IVON-LoRA."""
    folder = tmp_path_factory.mktemp("monday")
    trainer = make_trainer(tiny_llama, folder, save_strategy="no")
    attach(trainer, direction="newton")
    trainer.train()
    trainer.model.save_pretrained(folder)
    return folder


def test_how_far_weights_moved_is_from_the_prior_also_in_a_resumed_run(
    monday: Path, trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    q = Posterior.from_pretrained(monday)
    run = {"settings": {"prior": q}, "learning_rate": 3e-3, "max_steps": 4, "save_steps": 2}
    with caplog.at_level("INFO", "axolotl_ivon"):
        trained(**run)
    new = Posterior.from_pretrained(tmp_path / "checkpoint-4")
    apart = torch.cat([(new.mean[key] - q.mean[key]).abs().flatten() for key in q.mean if "lora_B" in key])
    assert float(new.metadata["moved"]) == pytest.approx(float(apart.mean()), rel=1e-3)
    found = diagnose(tmp_path / "checkpoint-4")
    assert found["moved"] == float(new.metadata["moved"])
    said = [one["text"] for one in found["findings"] if one["about"] in ("weights", "sigma")]
    assert set(said) <= set(caplog.messages)
    trained(**run, resume=tmp_path / "checkpoint-2")
    assert Posterior.from_pretrained(tmp_path / "checkpoint-4").metadata == new.metadata


def test_training_starts_at_the_posterior_and_its_header_tells_the_chain(
    monday: Path, attached: Any, trained: Any, tmp_path: Path
) -> None:
    q = Posterior.from_pretrained(monday)
    trainer = attached({"prior": q, "prior_strength": 0.5}, "tuesday", save_strategy="no", max_steps=4)
    trainer.create_optimizer()
    optimizer = trainer.posterior_training.optimizer
    for name, param in trainer.posterior_training.params.items():
        key = name.replace(".default", "")
        assert torch.equal(param.detach(), q.mean[key])
        torch.testing.assert_close(optimizer.sigma(param), q.sigma[key], rtol=1e-5, atol=0)
        torch.testing.assert_close(optimizer.prior_precision(param), 0.5 / q.sigma[key] ** 2, rtol=1e-5, atol=0)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "tuesday")

    header = Posterior.from_pretrained(tmp_path / "tuesday").metadata
    assert header["prior"] == str(monday)
    assert header["prior_sha256"] == q.metadata["mean_sha256"]
    assert (header["prior_strength"], header["train_size"], header["chain_train_size"]) == ("0.5", "24", "48")
    assert float(header["ess"]) == float(q.metadata["ess"]), "λ is that of the new data alone"

    colder = Posterior.from_pretrained(tmp_path / "tuesday").temper(0.25)
    third = trained({"prior": colder}, "wednesday", save_strategy="no", max_steps=1)
    third.model.save_pretrained(tmp_path / "wednesday")
    header = Posterior.from_pretrained(tmp_path / "wednesday").metadata
    before, first = links(header)
    assert (before.name, before.strength, before.train_size) == (str(tmp_path / "tuesday"), 0.25, 24)
    assert (first.name, first.strength, first.sha256) == (str(monday), 0.5, q.metadata["mean_sha256"])
    assert (header["prior_strength"], header["chain_train_size"]) == ("300.0", "72")
    assert all(isinstance(value, str) for value in header.values())
    assert json.loads(header["prior_chain"])[1][3] == str(monday)


def test_the_prior_may_be_given_by_its_folder(monday: Path, attached: Any, tmp_path: Path) -> None:
    by_value = attached({"prior": Posterior.from_pretrained(monday)}).posterior_training
    for folder in (monday, str(monday)):
        run = attached({"prior": folder}).posterior_training
        torch.testing.assert_close(run.settings["prior"], by_value.settings["prior"], rtol=0, atol=0)
        assert run.header == by_value.header
    with pytest.raises(IVONError, match=r"^prior: 'sunday' is refused, it must be 'empirical', a number, or the"):
        attached({"prior": "sunday"})


def test_a_strong_prior_holds_the_weights_and_a_weak_one_lets_them_go(monday: Path, trained: Any) -> None:
    q, moved = Posterior.from_pretrained(monday), []
    for strength in (1e-3, 1e6):
        trainer = trained({"prior": q, "prior_strength": strength}, save_strategy="no", max_steps=20)
        weights = lora_weights(trainer.model)
        moved.append(max(float((w - q.mean[n.replace(".default", "")]).abs().max()) for n, w in weights.items()))
    assert moved[1] < 0.5 * moved[0]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does_and_needs_the_same_prior(
    monday: Path, trained: Any, tmp_path: Path
) -> None:
    q, checkpoint = Posterior.from_pretrained(monday), tmp_path / "a" / "checkpoint-3"
    trained({"prior": q}, "a")
    trained({"prior": q}, "b", checkpoint)
    for name in ("adapter_model.safetensors", "ivon_sigma.safetensors"):
        left, right = ((tmp_path / run / "checkpoint-6" / name).read_bytes() for run in ("a", "b"))
        assert left == right
    with pytest.raises(IVONError, match=r"^prior: .*checkpoint-3 started from .* and this run from none; resume with"):
        trained(None, "c", checkpoint)


class SavesBeforeItsFirstStep(TrainerCallback):
    """As a handler of Ctrl-C does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not (folder := Path(args.output_dir) / "begun").exists():
            model.save_pretrained(folder)


@pytest.mark.parametrize("only_model", [False, True])
def test_the_weights_of_a_checkpoint_go_before_the_prior_from_the_first_moment_on(
    only_model: bool, monday: Path, trained: Any, made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weak = {"prior": Posterior.from_pretrained(monday), "prior_strength": 0.01}
    run: dict[str, Any] = {"settings": weak, "save_only_model": only_model}
    trained(**run, folder="first")
    spies: dict[str, Any] = {"callbacks": [SavesBeforeItsFirstStep()], "eval_on_start": True}
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        again = trained(**run, **spies, folder="again", resume=tmp_path / "first" / "checkpoint-3")
    assert ("has no optimizer state: training goes on from its mean and σ" in caplog.text) is only_model
    begun, saved = (Posterior.from_pretrained(tmp_path / name) for name in ("again/begun", "first/checkpoint-3"))
    assert same(begun.mean, saved.mean)
    torch.testing.assert_close(dict(begun.sigma), dict(saved.sigma), rtol=2e-6 * only_model, atol=0)
    plain = made()
    plain.model.load_adapter(str(tmp_path / "first" / "checkpoint-3"), "default")
    evaluated = next(entry["eval_loss"] for entry in again.state.log_history if "eval_loss" in entry)
    assert evaluated == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("only_model", [False, True])
def test_a_run_that_has_ended_and_is_started_once_more_stays_where_it_ended(
    only_model: bool, monday: Path, trained: Any, tmp_path: Path
) -> None:
    """As axolotl's auto_resume_from_checkpoints does after a killed job."""
    weak = {"prior": Posterior.from_pretrained(monday), "prior_strength": 0.01}
    run: dict[str, Any] = {"settings": weak, "save_only_model": only_model}
    for resume in (None, tmp_path / "checkpoint-6"):
        trained(**run, resume=resume).save_model(str(tmp_path / ("again" if resume else "ended")))
    ended, again = (Posterior.from_pretrained(tmp_path / name) for name in ("ended", "again"))
    assert same(ended.mean, again.mean)
    torch.testing.assert_close(dict(ended.sigma), dict(again.sigma), rtol=2e-6 * only_model, atol=0)


def test_dpo_from_an_adapter_holds_it_as_the_prior_and_saves_no_sigma_of_the_reference(
    monday: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """TRL copies the adapter that it is given to a frozen one of the name `ref`."""
    import trl

    args = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "report_to": []}
    q, ends = Posterior.from_pretrained(monday), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), monday, is_trainable=True)
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, disable_tqdm=True, **args),
            train_dataset=Dataset.from_list([{"prompt": "red", "chosen": " dog", "rejected": " cat"}] * 8),
        )
        attach(trainer, prior=q)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(lora_weights(trainer.model))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    posterior, reference = Posterior.from_pretrained(tmp_path / "checkpoint-4"), tmp_path / "checkpoint-4" / "ref"
    assert posterior.metadata["prior_sha256"] == q.metadata["mean_sha256"]
    assert all((sigma > 0).all() for sigma in posterior.sigma.values())
    assert any(not torch.equal(posterior.mean[key], q.mean[key]) for key in q.mean)
    assert not (reference / "ivon_sigma.safetensors").exists()
    assert same(load_file(reference / "adapter_model.safetensors"), q.mean)


def test_an_adapter_that_was_trained_already_goes_on_from_its_weights(
    monday: Path, made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, q = made(), Posterior.from_pretrained(monday)
    for param in trainer.model.parameters():
        param.data.add_(0.01 * param.requires_grad)
    before = lora_weights(trainer.model)
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        attach(trainer, prior=q)
    assert "was trained already: training goes on from its weights" in caplog.text
    trainer.create_optimizer()
    for name, param in trainer.posterior_training.params.items():
        assert torch.equal(trainer.optimizer.mean(param), before[name])
        torch.testing.assert_close(trainer.optimizer.sigma(param), q.sigma[name.replace(".default", "")] / 300**0.5)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 2}, "has r 4 and this adapter 2; set lora_r: 4"),
        ({"lora_alpha": 16}, "has lora_alpha 8 and this adapter 16; set lora_alpha: 8"),
        ({"use_rslora": True}, "has use_rslora False and this adapter True"),
        ({"target_modules": ["q_proj"]}, "is on q_proj, v_proj and this adapter on q_proj; set lora_target_modules"),
        ({"target_modules": ["q_proj", "k_proj"]}, "is on q_proj, v_proj and this adapter on k_proj, q_proj"),
        ({"layers_to_transform": [1]}, r"this adapter differ in base_model.*layers\.0\.self_attn\.q_proj.*lora_A"),
    ],
)
def test_another_rank_scaling_or_other_targets_are_refused_saying_which(
    lora: dict[str, Any], words: str, monday: Path, attached: Any
) -> None:
    with pytest.raises(IVONError, match=rf"^prior: {monday}.*{words}[^\n]*$") as caught:
        attached({"prior": Posterior.from_pretrained(monday)}, lora=lora)
    assert caught.value.parameter == "prior"


def test_a_posterior_without_width_or_over_another_model_or_with_settings_of_its_own_is_refused(
    monday: Path, attached: Any
) -> None:
    q = Posterior.from_pretrained(monday)
    other = Posterior(q.mean, q.sigma, q.metadata, {**q.config, "base_model_name_or_path": "other/llama"})
    zero = Posterior(q.mean, {**q.sigma, next(iter(q.sigma)): q.sigma[next(iter(q.sigma))] * 0}, q.metadata, q.config)
    for wrong, words in (
        ({"prior": q.prune(0.2)}, "is pruned, and pruned weights cannot be trained"),
        ({"prior": q.temper(float("inf"))}, "tau inf"),
        ({"prior": other}, "is over llama and this adapter over tiny-llama"),
        ({"prior": zero}, "differ in base_model"),
        ({"prior": Posterior(q.mean, q.sigma, q.metadata, {**q.config, "lora_alpha": 9})}, "has lora_alpha 9 and this"),
        ({"h0": 0.1}, "^h0: 0.1 does not go with a posterior as prior"),
        ({"rescale_lr": True}, "^rescale_lr: True does not go with a posterior as prior"),
    ):
        with pytest.raises(IVONError, match=words):
            attached({"prior": q, **wrong})


def test_a_bfloat16_adapter_goes_on_from_a_float32_mean(monday: Path, made: Any, tmp_path: Path) -> None:
    q, trainer = Posterior.from_pretrained(monday), made(save_strategy="no", max_steps=1)
    for param in lora_weights(trainer.model):
        trainer.model.get_parameter(param).data = trainer.model.get_parameter(param).data.bfloat16()
    attach(trainer, prior=q)
    trainer.create_optimizer()
    means = {name: trainer.optimizer.mean(param) for name, param in trainer.posterior_training.params.items()}
    assert same(as_saved(means), q.mean)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    assert {mean.dtype for mean in Posterior.from_pretrained(tmp_path / "saved").mean.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"rank_pattern": {"q_proj": 2}},
    ],
    ids=["dora", "modules_to_save", "embedding", "ranks"],
)
def test_whatever_an_adapter_is_made_of_can_be_the_prior(
    lora: dict[str, Any], trained: Any, attached: Any, tmp_path: Path
) -> None:
    first = trained(folder="first", lora=lora, max_steps=2, save_strategy="no")
    first.model.save_pretrained(tmp_path / "first")
    posterior, expected = Posterior.from_pretrained(tmp_path / "first"), lora_weights(first.model)
    assert sum(int((s > 0).sum()) for s in posterior.sigma.values()) == sum(p.numel() for p in expected.values())
    second = attached({"prior": posterior}, "second", lora=lora)
    second.create_optimizer()
    for name, param in second.posterior_training.params.items():
        assert torch.equal(param.detach(), expected[name])
        sigma = first.posterior_training.optimizer.sigma(first.model.get_parameter(name))
        natural = sigma * posterior.training_tau**0.5  # of what the data say, without the τ of so short a run
        torch.testing.assert_close(second.optimizer.sigma(param), natural / 300**0.5)  # the preset's κ
    assert posterior.tau == posterior.training_tau == 1e4
    assert links({**second.posterior_training.header})[0].strength == 1
