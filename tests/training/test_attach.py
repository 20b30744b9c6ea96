"""attach(): IVON-LoRA in transformers' and TRL's Trainers, in this process, on the tiny Llama."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.optim.lr_scheduler import OneCycleLR
from trainers import LORA, Spy, lora_weights, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from axolotl_ivon import IVONError, IVONLoRA, Posterior, attach, effective_sample_size, hookimpl
from axolotl_ivon.plugins import plugin_manager


def test_trains_and_saves_sigma_beside_every_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    before = lora_weights(trainer.model)
    attach(trainer, gamma=100.0, clip=0.1)
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


def test_the_log_shows_the_posterior_and_nothing_per_parameter(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    attach(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        ours = {key for key in entry if key.startswith("ivon_")}
        assert ours == {"ivon_sigma_mean", "ivon_snr_mean", "ivon_ess"}
        assert entry["ivon_sigma_mean"] > 0
        assert entry["ivon_ess"] == pytest.approx(effective_sample_size(24))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_does_what_a_plain_loop_does(tiny_llama: Path, tmp_path: Path, accumulation: int) -> None:
    """The loop that the README shows, on the same batches, ends where the Trainer ends, bit for bit."""
    spy = Spy()
    trainer = make_trainer(
        tiny_llama,
        tmp_path / "a",
        {"lora_dropout": 0.0},
        [spy],
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        max_steps=4,
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    seen: list[tuple[Any, Any]] = []
    compute_loss = trainer.compute_loss

    def spying(model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        seen.append(({key: value.clone() for key, value in inputs.items()}, num_items_in_batch))
        return compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = spying
    attach(trainer, clip=0.1)
    trainer.train()

    other = make_trainer(tiny_llama, tmp_path / "b", {"lora_dropout": 0.0})
    model = other.model.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = IVONLoRA(named, lr=3e-2, ess=effective_sample_size(24), clip=0.1, seed=5)
    for step in range(4):
        for inputs, items in seen[step * accumulation : (step + 1) * accumulation]:
            with optimizer.sampled_params():
                model(**inputs, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, param in named:
            assert torch.equal(param, spy.means[step][name]), (step, name)


def test_whoever_reads_the_model_at_a_draw_reads_the_mean(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, save_strategy="no")
    attach(trainer, gamma=10.0)
    compute_loss = trainer.compute_loss
    previous: dict[str, torch.Tensor] = {}
    checked = []

    def reading(model: Any, *args: Any, **kwargs: Any) -> Any:
        if previous:
            drawn = lora_weights(model)
            state = model.state_dict()
            model.save_pretrained(tmp_path / "mid-step")
            posterior = Posterior.from_pretrained(tmp_path / "mid-step")
            for name, mean in previous.items():
                assert not torch.equal(drawn[name], mean)
                assert torch.equal(state[name], mean)
                assert torch.equal(posterior.mean[name.replace(".default", "")], mean)
            assert all(torch.equal(drawn[name], p) for name, p in lora_weights(model).items()), "the draw goes on"
            checked.append(True)
        return compute_loss(model, *args, **kwargs)

    class Note(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **_: Any) -> None:
            previous.update(lora_weights(model))

    trainer.add_callback(Note())
    trainer.compute_loss = reading
    trainer.train()
    assert len(checked) == 5


def test_an_exception_in_the_forward_pass_leaves_the_mean(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    before = lora_weights(trainer.model)
    attach(trainer)

    def failing(*args: Any, **kwargs: Any) -> Any:
        assert not torch.equal(next(iter(lora_weights(trainer.model).values())), next(iter(before.values())))
        raise MemoryError

    trainer.compute_loss = failing
    with pytest.raises(MemoryError):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in lora_weights(trainer.model).items())


def test_evaluation_during_training_sees_the_mean(tiny_llama: Path, tmp_path: Path) -> None:
    spy = Spy()
    trainer = make_trainer(tiny_llama, tmp_path, None, [spy], eval_strategy="steps", eval_steps=1, save_strategy="no")
    attach(trainer, gamma=10.0)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6
    plain = make_trainer(tiny_llama, tmp_path / "plain")
    for loss, mean in zip(losses, spy.means, strict=True):
        plain.model.load_state_dict(mean, strict=False)
        assert plain.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_from_a_checkpoint_continues_the_same_run(tiny_llama: Path, tmp_path: Path, accumulation: int) -> None:
    def train(folder: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            tiny_llama, tmp_path / folder, gradient_accumulation_steps=accumulation, per_device_train_batch_size=2
        )
        attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return lora_weights(trainer.model)

    straight = train("a")
    resumed = train("b", str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    for name in ("adapter_model.safetensors", "ivon_sigma.safetensors"):
        left, right = (load_file(tmp_path / run / "checkpoint-6" / name) for run in ("a", "b"))
        assert all(torch.equal(left[key], right[key]) for key in left)


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


def test_the_best_checkpoint_s_sigma_goes_with_the_best_checkpoint_s_mean(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_llama,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is not the last
    )
    attach(trainer, clip=1.0)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    trainer.save_model(str(tmp_path / "final"))
    final, checkpoint = Posterior.from_pretrained(tmp_path / "final"), Posterior.from_pretrained(best)
    assert final.metadata["steps"] == checkpoint.metadata["steps"] != "6"
    for key in final.mean:
        assert torch.equal(final.mean[key], checkpoint.mean[key])
        assert torch.equal(final.sigma[key], checkpoint.sigma[key])


def test_gradient_clipping_is_off_unless_it_was_asked_for(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=1)
    attach(trainer)
    assert trainer.args.max_grad_norm == 0
    trainer.train()
    assert "max_grad_norm" not in caplog.text
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=1, max_grad_norm=0.3)
    attach(trainer)
    assert trainer.args.max_grad_norm == 0.3
    trainer.train()
    assert "max_grad_norm 0.3" in caplog.text


def test_warnings_say_why(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=4, learning_rate=2e-4, lr_scheduler_type="linear")
    attach(trainer, clip=0.01)
    trainer.train()
    assert "learning_rate 0.0002 looks like one for Adam" in caplog.text
    reach = 2e-4 * 0.01 * (1 + 0.75 + 0.5 + 0.25)
    assert f"farther than {reach:.3g}" in caplog.text
    assert f"with {2e-4 * 0.13 / reach:.2g} it is 0.13" in caplog.text
    caplog.clear()
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=4, learning_rate=0.1)
    attach(trainer, clip=1.0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "axolotl_ivon" not in caplog.text


def test_a_gradient_that_is_not_finite_is_told_with_its_step(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy()
    trainer = make_trainer(tiny_llama, tmp_path, None, [spy], max_steps=3)
    attach(trainer)
    compute_loss, calls = trainer.compute_loss, []

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return compute_loss(*args, **kwargs) * (math.nan if len(calls) == 2 else 1.0)

    trainer.compute_loss = spoiled
    trainer.train()
    assert "step 2 was skipped" in caplog.text
    first, second, third = spy.means
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)


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


def test_a_third_party_adds_metrics_and_hears_of_saved_posteriors(tiny_llama: Path, tmp_path: Path) -> None:
    saved = []

    class ThirdParty:
        @hookimpl
        def log_metrics(self, trainer: Any, optimizer: Any) -> dict[str, float]:
            return {"my_metric": 1.5}

        @hookimpl
        def posterior_saved(self, folder: str) -> None:
            assert Posterior.from_pretrained(folder)
            saved.append(Path(folder).name)

    third_party = ThirdParty()
    plugin_manager().register(third_party)
    try:
        trainer = make_trainer(tiny_llama, tmp_path)
        attach(trainer)
        trainer.train()
    finally:
        plugin_manager().unregister(third_party)
    assert saved == ["checkpoint-3", "checkpoint-6"]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["my_metric"] == 1.5
    assert entry["ivon_sigma_mean"] > 0


class Rates(TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"lr_scheduler_type": "linear", "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "polynomial", "learning_rate": 0.0},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.5}, "learning_rate": 0.0},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 100},
    ],
)
def test_the_preset_for_small_data_lets_a_weight_travel_as_far_in_any_schedule(
    schedule: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    spy = Rates()
    trainer = make_trainer(tiny_llama, tmp_path, callbacks=[spy], **{"learning_rate": 1e-5, **schedule})
    attach(trainer, preset="small_data")
    trainer.train()
    assert len(spy.rates) == trainer.state.max_steps > 3
    assert sum(spy.rates) * 0.01 == pytest.approx(0.125)
    header = Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata
    assert (float(header["ess"]), header["gamma"], header["train_size"]) == (240.0, "", "24")


def test_the_preset_keeps_the_noise_of_all_layers_together_in_bounds(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    matrices = [p.detach() for name, p in trainer.model.named_parameters() if "lora_A" in name]
    attach(trainer, preset="small_data", h0=1e-3)
    ess = trainer.callback_handler.callbacks[-1].settings["ess"]
    assert ess > 240
    # σ² = 1/(λ·h0) at the start, to what the matrices' own variance is on average
    noise = sum(1 / (ess * 1e-3) / matrix.var() for matrix in matrices)
    assert noise == pytest.approx(64, rel=0.2)


def test_what_is_given_goes_before_a_preset(tiny_llama: Path, tmp_path: Path) -> None:
    spy = Rates()
    trainer = make_trainer(tiny_llama, tmp_path, callbacks=[spy])
    attach(trainer, preset="small_data", gamma=7.0, clip=0.02)
    trainer.train()
    assert sum(spy.rates) * 0.02 == pytest.approx(0.125)
    header = Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata
    assert (float(header["ess"]), header["gamma"], header["clip"]) == (7.0 * math.sqrt(24), "7.0", "0.02")


def test_a_run_with_a_preset_resumes_at_the_same_rates(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends, chosen = [], []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        spy = Rates()
        trainer = make_trainer(tiny_llama, tmp_path, callbacks=[spy])
        attach(trainer, preset="small_data")
        trainer.train(resume_from_checkpoint=resume)
        ends.append((spy.rates[-3:], lora_weights(trainer.model)))
        chosen.append(trainer.args.learning_rate)
    assert ends[0][0] == ends[1][0]
    assert chosen[0] == chosen[1]
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])
    assert "goes on at its learning_rate" not in caplog.text
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=12)
    attach(trainer, preset="small_data")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert f"goes on at its learning_rate {chosen[0]:.3g}, not at" in caplog.text


def test_a_second_run_of_another_length_has_a_rate_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    spy = Rates()
    trainer = make_trainer(tiny_llama, tmp_path, callbacks=[spy])
    attach(trainer, preset="small_data")
    trainer.train()
    trainer.args.max_steps = 3
    trainer.train()
    assert sum(spy.rates[6:]) * 0.01 == pytest.approx(0.125)


def test_a_schedule_that_begins_below_its_peak_is_no_checkpoint(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Rates()
    trainer = make_trainer(tiny_llama, tmp_path, callbacks=[spy])

    def one_cycle(num_training_steps: int, optimizer: Any = None) -> Any:
        peak, total = trainer.args.learning_rate, num_training_steps + 1
        trainer.lr_scheduler = OneCycleLR(optimizer or trainer.optimizer, max_lr=peak, total_steps=total)
        return trainer.lr_scheduler

    trainer.create_scheduler = one_cycle
    attach(trainer, preset="small_data")
    trainer.train()
    assert sum(spy.rates) * 0.01 == pytest.approx(0.125)
    assert "goes on at its learning_rate" not in caplog.text


def test_what_a_preset_cannot_work_with_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(IVONError, match="preset: 'tiny' is unknown; choose one of paper, small_data"):
        attach(make_trainer(tiny_llama, tmp_path), preset="tiny")  # type: ignore[arg-type]
    with pytest.raises(IVONError, match="h0 must be positive"):
        attach(make_trainer(tiny_llama, tmp_path), preset="small_data", h0=0.0)
    trainer = make_trainer(tiny_llama, tmp_path)
    with pytest.raises(IVONError, match="clip: inf"):
        attach(trainer, preset="small_data", clip=math.inf)
    attach(trainer, preset="small_data")  # the refusal left nothing behind
    assert sum("PosteriorTraining" in type(one).__name__ for one in trainer.callback_handler.callbacks) == 1
    trainer = make_trainer(tiny_llama, tmp_path)
    trainer.create_optimizer()
    trainer.create_scheduler(6)
    trainer.optimizer = None
    with pytest.raises(IVONError, match="no scheduler of your own"):
        attach(trainer, preset="small_data")
