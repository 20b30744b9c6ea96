"""A transformers Trainer over the tiny Llama, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}

IVON_METRICS = {f"ivon_{name}" for name in ("sigma_mean", "snr_mean", "log_sigma_spread", "clipped_share", "kl", "ess")}


def make_trainer(
    base: Path,
    output: Path,
    lora: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
    adapter: str = "default",
    **args: Any,
) -> Trainer:
    torch.manual_seed(1)
    config = LoraConfig(**{**LORA, **(lora or {})})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter)
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-4,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        **args,
    }
    rows = torch.randint(3, 300, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in rows])
    training = TrainingArguments(str(output), **settings)
    return trainer_class(model, training, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def lora_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def as_saved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights by the keys that PEFT saves them by."""
    return {name.replace(".default", ""): weight for name, weight in weights.items()}


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def before_every_loss(trainer: Trainer, note: Callable[..., None]) -> None:
    """Call `note` with the model, the batch and what else `compute_loss` is given, before it."""
    compute_loss = trainer.compute_loss

    def noting(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = noting


class Spy(TrainerCallback):
    """Notes the adapter's weights at the end of every step, which is outside of every draw."""

    def __init__(self) -> None:
        self.means: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.means.append(lora_weights(model))


class Rates(TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
