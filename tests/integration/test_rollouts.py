"""`rl: grpo` in real axolotl processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from runs import Configs, Forks

from axolotl_ivon import Posterior

DRAWS = {"ivon_rollouts": "draws", "ivon_rollout_draws": 2}
GRPO = {
    "rl": "grpo",
    "datasets": [{"path": "chats.jsonl", "ds_type": "json", "split": "train", "type": "rewards.prompts"}],
    "lora_target_modules": ["q_proj", "lm_head"],
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_epochs": 20,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "logging_steps": 1,
}


def trl(reward: str = "share", **keys: Any) -> dict[str, Any]:
    own = {"num_generations": 8, "max_completion_length": 16, "reward_funcs": [f"rewards.{reward}"]}
    return {"trl": {**own, **keys}}


def rewards(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["reward"] for entry in history if "reward" in entry]


def test_the_reward_rises_and_sigma_is_saved(make_config: Configs, make_adapter: Any, forks: Forks) -> None:
    # axolotl does not seed a new adapter, and from some of them so short a run gets nowhere.
    targets = {"target_modules": GRPO["lora_target_modules"], "lora_alpha": GRPO["lora_alpha"]}
    start = {"lora_model_dir": str(make_adapter(sigma=False, **targets))}
    config = make_config("rises", **{**GRPO, **trl(), **start}, max_steps=40, save_steps=40)
    forks.train(config)
    learned = rewards(config.with_suffix("") / "checkpoint-40")
    assert sum(learned[-5:]) > sum(learned[:5]) + 0.25
    sigma = Posterior.from_pretrained(config.with_suffix("")).sigma
    assert all((value > 0).all() for key, value in sigma.items() if "lora_" in key)


def test_a_checkpoint_resumes_exactly(make_config: Configs, make_adapter: Any, forks: Forks) -> None:
    """Within an epoch: TRL shuffles its prompts in every epoch and does not save where that stands."""
    start, ends = str(make_adapter()), []
    for resume in (None, "whole/checkpoint-3"):
        name = "resumed" if resume else "whole"
        changes = {**GRPO, **trl(), **DRAWS, "lora_model_dir": start, "resume_from_checkpoint": resume}
        config = make_config(name, **changes, max_steps=6, save_steps=3)
        forks.train(config)
        ends.append(Posterior.from_pretrained(config.with_suffix("")))
    for key in ends[0].mean:
        assert torch.equal(ends[0].mean[key], ends[1].mean[key])
        assert torch.equal(ends[0].sigma[key], ends[1].sigma[key])


def test_sigint_while_completions_are_scored_leaves_the_mean(make_config: Configs, forks: Forks) -> None:
    config = make_config("interrupted-rollout", **{**GRPO, **trl("interrupting"), **DRAWS}, max_steps=6, save_steps=2)
    result = forks("train", config, "--launcher", "python", cwd=config.parent)
    output = config.with_suffix("")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (output / "checkpoint-4").exists(), "it was not interrupted"
    saved, checkpoint = Posterior.from_pretrained(output), Posterior.from_pretrained(output / "checkpoint-2")
    for key in saved.mean:
        assert torch.equal(saved.mean[key], checkpoint.mean[key])
