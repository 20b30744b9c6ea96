"""The Trainer's overrides, in transformers' Trainer and in subclasses of it."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import OneCycleLR
from trainers import LORA, Rates, Spy, as_saved, before_every_loss, lora_weights, make_trainer, same
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
)

from axolotl_ivon import IVONError, IVONLoRA, Posterior, attach, effective_sample_size, save_posterior
from axolotl_ivon.training.checkpoints import update_card_in


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_does_what_a_plain_loop_does(made: Any, accumulation: int) -> None:
    """The loop that the README shows, on the same batches, ends where the Trainer ends, bit for bit."""
    spy, plain = Spy(), {"lora": {"lora_dropout": 0.0}}
    batches = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "max_steps": 4}
    schedule = {"learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    trainer = made(callbacks=[spy], save_strategy="no", **schedule, **batches, **plain)
    seen: list[tuple[Any, Any]] = []

    def see(model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> None:
        seen.append(({key: value.clone() for key, value in inputs.items()}, num_items_in_batch))

    before_every_loss(trainer, see)
    attach(trainer, preset="paper", clip=0.1)
    trainer.train()

    model = made(**plain).model.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = IVONLoRA(named, lr=3e-2, ess=effective_sample_size(24), clip=0.1, seed=5)
    for step in range(4):
        for inputs, items in seen[step * accumulation : (step + 1) * accumulation]:
            with optimizer.sampled_params():
                model(**inputs, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert same(dict(named), spy.means[step])


def test_a_loop_without_a_trainer_saves_its_posterior(made: Any, tiny_adapter: Path, tmp_path: Path) -> None:
    trainer = made(lora={"lora_dropout": 0.0})
    model, batch = trainer.model.train(), trainer.data_collator([trainer.train_dataset[0]])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    earlier = Posterior.from_pretrained(tiny_adapter)
    own = {name: (p.detach().clone(), torch.full_like(p, 0.1)) for name, p in named}
    for given, folder in (({}, "out"), ({"prior": own, "prior_strength": 2.0}, "again")):
        optimizer = IVONLoRA(named, ess=1e4, **given)
        for _ in range(3):
            with optimizer.sampled_params():
                model(**batch).loss.backward()
                with pytest.raises(IVONError, match="at a draw; call it after the context"):
                    save_posterior(model, optimizer, tmp_path / "draw")
            optimizer.step()
            optimizer.zero_grad()
        prior = earlier if given else None
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recommended.json").write_text("{}")  # of what was there before
        (tmp_path / folder / "README.md").write_text("---\nlanguage: en\n---\n# Mine\n")
        save_posterior(model, optimizer, tmp_path / folder, train_size=24, prior=prior)
        assert not (tmp_path / folder / "recommended.json").exists()
        card = (tmp_path / folder / "README.md").read_text()
        assert "# Mine" in card
        assert "## Posterior" in card
        posterior = Posterior.from_pretrained(tmp_path / folder)
        assert same(posterior.mean, as_saved(dict(named)))
        assert same(posterior.sigma, as_saved({name: optimizer.sigma_for_next_prior(param) for name, param in named}))
        assert posterior.metadata.items() >= {"steps": "3", "train_size": "24", "ess": "10000.0", "h0": "0.05"}.items()
        assert posterior.metadata.get("prior_sha256") == (earlier.metadata["mean_sha256"] if given else None)
    assert not (tmp_path / "draw").exists()
    with pytest.raises(IVONError, match="is trained and this optimizer does not have it"):
        save_posterior(model, IVONLoRA(named[1:], ess=1e4), tmp_path / "part")


def test_a_trainer_that_is_given_the_optimizer_says_what_to_call(made: Any) -> None:
    trainer = made()
    trainer.optimizer = IVONLoRA([p for p in trainer.model.parameters() if p.requires_grad], ess=1e4)
    with pytest.raises(RuntimeError, match=r"in a Trainer, call attach\(trainer\) and give it no optimizers=$"):
        trainer.train()


def test_evaluation_during_training_sees_the_mean(trained: Any, made: Any) -> None:
    spy = Spy()
    trainer = trained({"gamma": 10.0}, callbacks=[spy], eval_strategy="steps", eval_steps=1, save_strategy="no")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6
    plain = made()
    for loss, mean in zip(losses, spy.means, strict=True):
        plain.model.load_state_dict(mean, strict=False)
        assert plain.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("accumulation", "adapter", "direction"), [(1, "default", "adam"), (2, "default", "newton"), (2, "mine", "newton")]
)
def test_resuming_from_a_checkpoint_continues_the_same_run(
    trained: Any, tmp_path: Path, accumulation: int, adapter: str, direction: str
) -> None:
    run = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "adapter": adapter}
    trained({"direction": direction}, folder="a", **run)
    trained({"direction": direction}, folder="b", resume=tmp_path / "a" / "checkpoint-3", **run)
    for name in ("adapter_model.safetensors", "ivon_sigma.safetensors"):
        folders = [tmp_path / run / "checkpoint-6" / ("" if adapter == "default" else adapter) for run in ("a", "b")]
        left, right = ((folder / name).read_bytes() for folder in folders)
        assert left == right


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_the_best_checkpoint_s_sigma_goes_with_the_best_checkpoint_s_mean(
    adapter: str, trained: Any, tmp_path: Path
) -> None:
    # The greatest, so that it is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = trained({"preset": "paper", "clip": 1.0, "eval_samples": 2}, adapter=adapter, **best, **steps)
    trainer.evaluate()  # at draws, after which the mean must be the best one's again
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    trainer.save_model(str(tmp_path / "final"))
    logged = [entry["eval_loss_posterior"] for entry in trainer.state.log_history if "eval_loss_posterior" in entry]
    assert logged[-1] == pytest.approx(logged[int(best.name[-1]) // 2 - 1], rel=1e-5)
    name = "" if adapter == "default" else adapter
    final, checkpoint = (Posterior.from_pretrained(folder / name) for folder in (tmp_path / "final", best))
    assert final.metadata["steps"] == checkpoint.metadata["steps"] != "6"
    assert same(final.mean, checkpoint.mean)
    assert same(final.sigma, checkpoint.sigma)


@pytest.fixture
def steps_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be as short as it is here: a sign may be as long as `travel` makes it."""
    monkeypatch.setattr("axolotl_ivon.training.trainer.LONGEST_SIGN", math.inf)


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"lr_scheduler_type": "linear", "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "polynomial", "learning_rate": 0.0},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.005}, "learning_rate": 0.0},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 100},
    ],
)
def test_without_a_rate_a_weight_travels_as_far_by_signs_in_any_schedule(
    schedule: dict[str, Any], trained: Any, tmp_path: Path, steps_of_any_length: None
) -> None:
    spy = Rates()
    trainer = trained({"direction": "newton"}, callbacks=[spy], **{"learning_rate": 0.0, **schedule})
    assert len(spy.rates) == trainer.state.max_steps > 3
    assert sum(spy.rates) * 0.01 == pytest.approx(0.125)
    header = Posterior.from_pretrained(tmp_path / "checkpoint-3").metadata
    assert float(header["ess"]) == 250_000
    assert (header["gamma"], header["train_size"]) == ("", "24")


@pytest.mark.parametrize(
    ("direction", "rate", "told", "tau"),
    [
        (None, 1.1e-3, "α 0.11 (no learning_rate is set: 0.0011 is usual for this model)", 1e4),
        (
            "newton",
            2.5e-4,
            "α 0.025 (no learning_rate is set: with this one a step moves a weight by at most 0.00025)",
            1.0,
        ),
    ],
)
def test_without_a_rate_a_run_has_one_for_its_model_or_for_signs(
    direction: str | None, rate: float, told: str, tau: float, trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    spy = Rates()
    trainer = trained({"direction": direction}, callbacks=[spy], learning_rate=0.0, lr_scheduler_type="linear")
    assert max(spy.rates) * 0.01 == spy.rates[0] * 0.01 == pytest.approx(rate)
    assert told in caplog.text
    assert trainer.optimizer.param_groups[0]["direction"] == (direction or "adam")
    assert trainer.optimizer.param_groups[0]["tau"] == tau
    assert trainer.posterior_training.header.get("learning_rate") == (None if direction else "0.0011")


@pytest.mark.parametrize("direction", ["newton", "adam"])
def test_a_run_with_a_preset_resumes_at_the_same_rates(
    direction: str, trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps_of_any_length: None
) -> None:
    ends = []
    for resume in (None, tmp_path / "checkpoint-3"):
        spy = Rates()
        trainer = trained({"direction": direction}, resume=resume, callbacks=[spy], learning_rate=0.0)
        ends.append((spy.rates[-3:], trainer.args.learning_rate, lora_weights(trainer.model)))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert "the checkpoint's learning_rate" not in caplog.text
    trained({"direction": direction}, resume=tmp_path / "checkpoint-3", max_steps=12, learning_rate=0.0)
    # That of signs depends on the length of a run, and the usual one on whether it sees its data often.
    assert (f"the checkpoint's learning_rate {ends[0][1]:.3g}, not at" in caplog.text) is (direction == "newton")


@pytest.mark.parametrize(("rate", "usual"), [(1e-3, "; 0.0011 is usual for this model"), (1.1e-3, ""), (2e-3, "")])
def test_a_lower_rate_than_the_usual_one_is_told_of(
    rate: float, usual: str, trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trained(learning_rate=rate)
    assert f" (a step moves a weight by at most the learning_rate, {rate:g}{usual}), steps by Adam" in caplog.text


@pytest.mark.parametrize("steps", [5, 10])
def test_epochs_are_counted_where_lambda_is_given_too(steps: int, trained: Any) -> None:
    """Of 24 examples in batches of 20, of which an epoch has two: ten epochs, and twenty."""
    few = trained({"ess": 1e6}, learning_rate=0.0, max_steps=4 * steps, per_device_train_batch_size=20)
    assert few.args.learning_rate * 0.01 == pytest.approx(1.1e-3 if steps == 5 else 5.5e-4)


def test_of_streamed_data_the_lower_rate_is_usual(made: Any) -> None:
    trainer = made(learning_rate=0.0)
    trainer.train_dataset = iter(())
    attach(trainer, ess=1e6)
    trainer.create_optimizer_and_scheduler(6)
    assert trainer.args.learning_rate * 0.01 == pytest.approx(5.5e-4)


def test_a_resumed_run_says_the_rate_that_it_keeps(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of six steps an epoch; a run of twenty has a lower rate."""
    trained(learning_rate=0.0, max_steps=6, save_steps=3)
    caplog.clear()
    resumed = trained(learning_rate=0.0, max_steps=120, save_steps=120, resume=tmp_path / "checkpoint-3")
    assert resumed.lr_scheduler.base_lrs[0] * 0.01 == pytest.approx(1.1e-3)
    assert Posterior.from_pretrained(tmp_path / "checkpoint-120").metadata["learning_rate"] == "0.0011"
    assert "the run resumes at the checkpoint's learning_rate 0.0011, not at 0.00055" in caplog.text


def test_a_resumed_run_tells_of_the_settings_that_it_keeps(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = {"ess": np.float64(1e6), "clip": np.float32(0.01)}  # of which a checkpoint keeps Python's numbers
    trained(first, max_steps=4, save_steps=2)
    caplog.clear()
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        trained({**first, "ess": 1e6}, max_steps=4, save_steps=2, resume=tmp_path / "checkpoint-2")
    assert "resuming with the checkpoint's" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        changed = {"ess": 5e7, "clip": 0.02, "betas": (0.5, 0.9)}
        again = trained(changed, max_steps=4, save_steps=4, resume=tmp_path / "checkpoint-2")
    [warning] = [r.getMessage() for r in caplog.records if "resuming with the checkpoint's" in r.getMessage()]
    assert "ess 1e+06" in warning
    assert "clip 0.01" in warning
    assert "betas (0.9, 0.9)" in warning
    assert "prior" not in warning
    assert "λ 1e+06, h0" in caplog.text
    assert again.optimizer.param_groups[0]["ess"] == again.posterior_training.settings["ess"] == 1e6
    header = Posterior.from_pretrained(tmp_path / "checkpoint-4").metadata
    sum_of_rates = sum(again.posterior_training.rates)
    assert float(header["travel"]) == pytest.approx(sum_of_rates * 0.01, rel=1e-4)
    assert header["learning_rate"] == "0.0003"


def test_the_best_checkpoint_by_the_loss_of_the_draws_has_the_lowest(trained: Any) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss_posterior"}
    trainer = trained({"eval_samples": 2}, **best, eval_strategy="steps", eval_steps=2, save_steps=2)
    losses = [entry["eval_loss_posterior"] for entry in trainer.state.log_history if "eval_loss_posterior" in entry]
    assert trainer.state.best_metric == min(losses) < max(losses)


def test_in_many_epochs_a_large_adapter_has_a_lower_rate_and_as_much_noise(tiny_llama: Path, tmp_path: Path) -> None:
    found = []
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # on both layers
    for rank, targets in ((4, ["q_proj"]), (128, every)):
        lora = {"r": rank, "target_modules": targets}
        args: dict[str, Any] = {"learning_rate": 0.0, "num_train_epochs": 20, "max_steps": -1, "save_strategy": "no"}
        trainer = make_trainer(tiny_llama, tmp_path, lora=lora, per_device_train_batch_size=24, **args)
        attach(trainer)
        trainer.train()
        header = trainer.posterior_training.header
        found.append((trainer.posterior_training.settings["ess"], float(header["learning_rate"])))
    assert found[0] == (125_000, 5.5e-4)
    # 131,072 weights in 14 matrices, of which 12 are usual.
    assert found[1] == (pytest.approx(125_000 * 1.31072**0.5), pytest.approx(5.5e-4 * (12 / 14) ** 0.5, rel=0.02))


def test_the_usual_rate_follows_from_the_epochs_in_any_schedule(trained: Any, tmp_path: Path) -> None:
    spy, least = Rates(), {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    trainer = trained(callbacks=[spy], learning_rate=0.0, **least)
    assert spy.rates[0] == pytest.approx(1.1e-3 / 0.01)
    assert min(spy.rates) > 1e-4 / 0.01
    assert Posterior.from_pretrained(tmp_path / "checkpoint-6").metadata["learning_rate"] == "0.0011"
    trainer.args.max_steps = 120
    trainer.train()
    assert spy.rates[6] == pytest.approx(5.5e-4 / 0.01)
    trainer.save_model(str(tmp_path / "longer"))
    assert Posterior.from_pretrained(tmp_path / "longer").metadata["learning_rate"] == "0.00055"


def test_a_second_run_of_another_length_has_a_rate_of_its_own(trained: Any, steps_of_any_length: None) -> None:
    spy = Rates()
    trainer = trained({"direction": "newton"}, callbacks=[spy], learning_rate=0.0)
    trainer.args.max_steps = 3
    trainer.train()
    assert sum(spy.rates[6:]) * 0.01 == pytest.approx(0.125)


def test_a_schedule_that_begins_below_its_peak_is_no_checkpoint(
    made: Any, caplog: pytest.LogCaptureFixture, steps_of_any_length: None
) -> None:
    spy = Rates()
    trainer = made(callbacks=[spy], learning_rate=0.0)

    def one_cycle(num_training_steps: int, optimizer: Any = None) -> Any:
        peak, total = trainer.args.learning_rate, num_training_steps + 1
        trainer.lr_scheduler = OneCycleLR(optimizer or trainer.optimizer, max_lr=peak, total_steps=total)
        return trainer.lr_scheduler

    trainer.create_scheduler = one_cycle
    attach(trainer, direction="newton")
    trainer.train()
    assert sum(spy.rates) * 0.01 == pytest.approx(0.125)
    assert "the checkpoint's learning_rate" not in caplog.text


class Own(Trainer):
    """A user's Trainer that notes which of its own methods run."""

    def create_scheduler(self, num_training_steps: int) -> Any:  # type: ignore[override] # as the Trainer calls it
        vars(self).setdefault("calls", set()).add("create_scheduler")
        return super().create_scheduler(num_training_steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        vars(self).setdefault("calls", set()).add("log")
        super().log({**logs, "mine": 1.0}, *args, **kwargs)


def _noting(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self).setdefault("calls", set()).add(name)
        return getattr(super(Own, self), name)(*args, **kwargs)

    return method


METHODS = ("training_step", "compute_loss", "evaluation_loop", "save_model", "_save_checkpoint")
for _name in METHODS:
    setattr(Own, _name, _noting(_name))


def test_a_trainer_stays_what_it_was_and_its_own_methods_still_run_under_ours(
    trained: Any, made: Any, tmp_path: Path
) -> None:
    trainer = trained({"eval_samples": 2}, trainer_class=Own, eval_strategy="steps", eval_steps=3)
    assert isinstance(trainer, Own)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(trainer), name) == getattr(Own, name)
    assert type(made(trainer_class=Own)) is Own, "only the Trainer that was given has changed"
    assert vars(trainer)["calls"] == {*METHODS, "create_scheduler", "log"}
    entries = trainer.state.log_history
    assert any({"mine", "loss", "ivon_sigma_mean"} <= entry.keys() for entry in entries)
    assert any({"mine", "eval_loss", "eval_loss_posterior"} <= entry.keys() for entry in entries)
    assert Posterior.from_pretrained(tmp_path / "checkpoint-6").metadata["steps"] == "6"


def test_the_trainer_s_card_describes_the_posterior(trained: Any, tmp_path: Path, caplog: Any) -> None:
    trainer = trained(max_steps=2, save_strategy="no")
    trainer.create_model_card()
    assert "## Posterior" not in (tmp_path / "README.md").read_text(), "there is no posterior here yet"
    trainer.save_model()
    trainer.create_model_card(tags=["mine"])  # as push_to_hub does
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.tags) >= {"ivon", "bayesian", "uncertainty"}
    assert "| steps | 2 |" in card.text
    assert "## Training procedure" in card.text
    assert "- optimizer: IVON-LoRA (axolotl-ivon) with beta1 0.9, beta2 0." in card.text
    assert "This model is a fine-tuned version of tiny-llama on" in card.text
    assert "- learning_rate: 0.0003 (IVON's α: 0.03)" in card.text
    assert not re.search("ADAM|adamw|from scratch|ADAPTER", card.text.replace(str(tmp_path), ""))
    (tmp_path / "README.md").write_bytes((tmp_path / "README.md").read_bytes().replace(b"tags:", b"tags: [", 1))
    update_card_in(tmp_path)
    assert "the model card does not describe the posterior" in caplog.text


def test_functions_that_were_assigned_to_a_trainer_still_run(made: Any) -> None:
    """As a plugin does that wraps a method of this one Trainer, before or after `attach`."""
    trainer = made(max_steps=2, logging_steps=1, save_strategy="no")
    calls = []

    def wrap(name: str, when: str) -> None:
        function = getattr(trainer, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, when))
            return function(*args, **kwargs)

        setattr(trainer, name, wrapped)

    for name in ("training_step", "compute_loss"):
        wrap(name, "before")
    attach(trainer)
    for name in ("training_step", "compute_loss"):
        wrap(name, "after")
    trainer.train()
    assert calls == 2 * [(name, when) for name in ("training_step", "compute_loss") for when in ("after", "before")]
    assert "ivon_sigma_mean" in trainer.state.log_history[0]


def test_a_shallow_copy_makes_schedules_too(attached: Any, steps_of_any_length: None) -> None:
    """DeepSpeed's integration makes the schedule with a copy of the Trainer."""
    trainer = attached({"direction": "newton"}, lr_scheduler_type="linear", learning_rate=0.0)
    trainer.create_optimizer()
    copied = copy.copy(trainer)
    schedule = copied.create_scheduler(6, optimizer=trainer.optimizer)
    assert trainer.lr_scheduler is None
    assert sum(schedule.base_lrs[0] * (1 - step / 6) for step in range(6)) * 0.01 == pytest.approx(0.125)


def test_after_running_out_of_memory_only_the_losses_of_the_new_batches_count(made: Any) -> None:
    """The second of two micro-batches fails; then batches are of 14, and all 24 examples a step."""
    spy, passes = Spy(), []
    trainer = made(
        auto_find_batch_size=True, per_device_train_batch_size=16, gradient_accumulation_steps=2, max_steps=2
    )

    def fail(*_: Any, **__: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    before_every_loss(trainer, fail)
    sizes: list[float] = []
    spy.on_step_end = lambda *_, optimizer, **__: sizes.append(optimizer.param_groups[0]["batch_size"])
    trainer.add_callback(spy)
    attach(trainer)
    trainer.train()
    assert (len(passes), sizes) == (6, [24 * 11] * 2)


def test_squared_gradients_are_scaled_by_the_number_of_losses_of_the_step(made: Any) -> None:
    """Two micro-batches of four texts of twelve tokens, of which eleven are predicted, and half of those masked."""
    for masked, expected in ((0, 2 * 4 * 11), (6, 2 * 4 * 6)):
        trainer = made(gradient_accumulation_steps=2, max_steps=1, save_steps=1)
        rows = [{**row, "labels": [-100] * masked + row["labels"][masked:]} for row in trainer.train_dataset]
        trainer.train_dataset = Dataset.from_list(rows)
        attach(trainer)
        trainer.train()
        assert trainer.posterior_training.optimizer.param_groups[0]["batch_size"] == expected


@pytest.mark.parametrize(
    ("kind", "labels", "expected"),
    [
        (AutoModelForSequenceClassification, lambda row: row[0] % 2, 4),
        (AutoModelForSequenceClassification, lambda row: [float(row[0] % 2), 1.0, 0.0], 4),  # several labels a text
        (AutoModelForSequenceClassification, lambda row: [float(row[0])], 4),  # a number
        (AutoModelForTokenClassification, lambda row: [-100] * 2 + [token % 2 for token in row[2:]], 4 * 10),
    ],
    ids=["classes", "several", "number", "tokens"],
)
def test_losses_are_counted_as_the_model_has_them(
    kind: Any, labels: Callable[[list[int]], Any], expected: int, made: Any, tiny_llama: Path
) -> None:
    rows = made().train_dataset["input_ids"]
    own = [{"input_ids": row, "attention_mask": [1] * 12, "labels": labels(row)} for row in rows]
    first = own[0]["labels"]
    count = len(first) if isinstance(first, list) and isinstance(first[0], float) else 2
    base = kind.from_pretrained(tiny_llama, num_labels=count)
    base.config.pad_token_id = 0
    task = "TOKEN_CLS" if kind is AutoModelForTokenClassification else "SEQ_CLS"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type=task))
    trainer = Trainer(model, made(max_steps=1, save_steps=1).args, train_dataset=Dataset.from_list(own))
    attach(trainer)
    trainer.train()
    assert trainer.posterior_training.optimizer.param_groups[0]["batch_size"] == expected


def test_a_pair_of_answers_has_one_loss(tiny_llama: Path, tmp_path: Path) -> None:
    import trl

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    trainer = trl.DPOTrainer(
        get_peft_model(model, LoraConfig(**LORA)),
        args=trl.DPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=4, report_to=[]
        ),
        train_dataset=Dataset.from_list([{"prompt": "red", "chosen": " dog", "rejected": " cat"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    attach(trainer)
    trainer.train()
    assert trainer.posterior_training.optimizer.param_groups[0]["batch_size"] == 4
