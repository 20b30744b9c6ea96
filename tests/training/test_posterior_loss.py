"""eval_loss_posterior against the definition, computed by hand from the draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import lora_weights, make_trainer
from transformers import TrainerCallback

from axolotl_ivon import IVONError, attach


def test_it_is_the_likelihood_of_the_averaged_prediction(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_llama, tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no", per_device_eval_batch_size=5
    )
    attach(trainer, gamma=1.0, eval_samples=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [set(entry) >= {"eval_loss", "eval_loss_posterior"} for entry in logged] == [True, True]

    model, optimizer = trainer.model.eval(), trainer.optimizer.optimizer
    mean = lora_weights(model)
    rows = torch.tensor(trainer.eval_dataset["input_ids"])
    probabilities = torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.float64)
    for number in range(4):
        with optimizer.evaluation_draw(number), torch.no_grad():
            assert not torch.equal(next(iter(lora_weights(model).values())), next(iter(mean.values())))
            predicted = model(input_ids=rows).logits[:, :-1].double().softmax(-1)
        probabilities += predicted.gather(-1, rows[:, 1:, None])[..., 0] / 4
    assert logged[-1]["eval_loss_posterior"] == pytest.approx(-probabilities.log().mean().item(), rel=1e-4)
    assert logged[-1]["eval_loss_posterior"] != pytest.approx(logged[-1]["eval_loss"], rel=1e-4)
    assert all(torch.equal(mean[name], p) for name, p in lora_weights(model).items())


def test_evaluating_changes_nothing_in_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    results = []
    for samples in (0, 3):
        trainer = make_trainer(
            tiny_llama,
            tmp_path / str(samples),
            eval_strategy="steps",
            eval_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )
        attach(trainer, eval_samples=samples)
        trainer.train()
        results.append(lora_weights(trainer.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_data_without_labels_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    class WithoutLabels(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.eval_dataset = trainer.eval_dataset.remove_columns("labels")

    trainer = make_trainer(tiny_llama, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(WithoutLabels())
    attach(trainer, eval_samples=2)
    with pytest.raises(IVONError, match="`labels`"):
        trainer.train()
    with pytest.raises(IVONError, match="eval_samples: -1"):
        attach(make_trainer(tiny_llama, tmp_path), eval_samples=-1)
