"""What axolotl trains with its own optimizers, IVON-LoRA trains too: a row of the README's support table each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PLUGINS, Configs, Forks

from axolotl_ivon import Posterior

# Triton kernels of axolotl's, for GPUs alone.
NO_KERNELS = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
WORDS = ("red", "blue", "green", "dog", "cat", "sun")
PAIRS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}


def preferences(kind: str, dataset: Any) -> dict[str, Any]:
    return {"rl": kind, "datasets": [{"path": "preferences.jsonl", "ds_type": "json", "split": "train", **dataset}]}


# Three steps of two micro-batches each, as `runs.Configs` says.
SUPPORTED: dict[str, dict[str, Any]] = {
    # precision
    "bf16": {"bf16": True, "plugins": [*PLUGINS, "axolotl_helpers.UseCpu"]},
    "fp16-scaler": {"fp16": True, "plugins": [*PLUGINS, "axolotl_helpers.UseCpu"]},
    "gradient-checkpointing": {"gradient_checkpointing": True},
    "torch-compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "sample-packing": {"sample_packing": True, "pad_to_sequence_len": True, "flash_attention": False},
    # quantized bases
    "int8": {"load_in_8bit": True, "adapter": "lora"},
    "qlora-nf4": {"load_in_4bit": True, "adapter": "qlora"},
    "qlora-nf4-packing-checkpointing": {"load_in_4bit": True, "adapter": "qlora", "gradient_checkpointing": True}
    | {"sample_packing": True, "pad_to_sequence_len": True},
    # adapters
    "dora": {"peft_use_dora": True},
    "rslora": {"peft_use_rslora": True},
    "pissa": {"peft_init_lora_weights": "pissa_niter_4"},
    "all-linear": {"lora_target_modules": None, "lora_target_linear": True, **NO_KERNELS},
    "embeddings": {"lora_target_modules": ["q_proj", "embed_tokens"]},
    "modules-to-save": {"lora_modules_to_save": ["lm_head"]},
    "experts": {"lora_target_parameters": ["mlp.down_proj.weight"], "lora_dropout": 0.0},
    # trainers
    "dpo": preferences("dpo", {"type": PAIRS}),
    "ipo": preferences("ipo", {"type": PAIRS}),
    "simpo": preferences("simpo", {"type": PAIRS}) | {"rl_beta": 2.0, "simpo_gamma": 1.0},
    "kto": preferences("kto", {"path": "labelled.jsonl", "type": {"field_prompt": "prompt"}})
    | {"remove_unused_columns": False},
    "orpo": preferences("orpo", {"path": "chosen.jsonl", "type": "chat_template.argilla"})
    | {"chat_template": "chatml", "remove_unused_columns": False},
    "reward-model": {
        "reward_model": True,
        "model_type": "AutoModelForSequenceClassification",
        "num_labels": 1,
        "chat_template": "chatml",
        "datasets": [{"path": "rewarded.jsonl", "type": "bradley_terry.chat_template"}],
        "remove_unused_columns": False,
        **NO_KERNELS,
    },
}


@pytest.fixture(scope="module")
def train(forks: Forks, make_config: Configs) -> Callable[..., Path]:
    """A function that trains with some keys and returns the output folder."""
    folder = make_config.folder
    chats = [(f"{a} {b}", "A", "B") if i % 2 else (f"{b} {a}", "B", "A") for i, a in enumerate(WORDS) for b in WORDS]

    def turns(prompt: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    rows = {
        "preferences": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in chats],
        "labelled": [{"prompt": p, "completion": c, "label": i % 2 == 0} for i, (p, c, _) in enumerate(chats)],
        "chosen": [{"prompt": p, "chosen": turns(p, c), "rejected": turns(p, r)} for p, c, r in chats],
        "rewarded": [{"system": "Answer.", "input": p, "chosen": c, "rejected": r} for p, c, r in chats],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(name: str, **keys: Any) -> Path:
        config = make_config(name, **{"max_steps": 3, "save_steps": 3, "ivon_clip": "1e-1", "logging_steps": 1, **keys})
        forks.train(config)
        return config.with_suffix("")

    return run


@pytest.mark.parametrize("name", SUPPORTED)
def test_it_trains_and_leaves_a_posterior(name: str, train: Callable[..., Path]) -> None:
    folder = train(name, **SUPPORTED[name])
    posterior = Posterior.from_pretrained(folder)
    assert set(posterior.mean) == set(Posterior.from_pretrained(folder / "checkpoint-3").mean)
    assert any(value.any() for key, value in posterior.mean.items() if "lora_B" in key or "lora_embedding_B" in key)
    assert posterior.metadata["steps"] == "3"
    assert not [*folder.glob("model*"), *folder.glob("pytorch_model*")], "the base model was saved"
    for key, sigma in posterior.sigma.items():
        assert torch.isfinite(posterior.mean[key]).all()
        # PEFT saves the embedding itself beside its LoRA; nobody has trained it.
        assert (sigma > 0).all() or ("base_layer" in key and not sigma.any()), key
    logged = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    spread = [line["ivon_sigma_mean"] for line in logged if "ivon_sigma_mean" in line]
    assert len(set(spread)) > 1  # a Hessian was estimated


def test_sigint_in_a_dpo_run_saves_the_mean_and_its_sigma(train: Callable[..., Path]) -> None:
    """axolotl's handler saves its own model, which under DPO is the base model that TRL puts the adapter into."""
    keys = {**SUPPORTED["dpo"], "save_steps": 2, "plugins": [*PLUGINS, "axolotl_helpers.InterruptInForward"]}
    folder = train("dpo-interrupted", **keys)
    drawn = torch.load(folder / "drawn.pt", weights_only=True)
    saved, checkpoint = Posterior.from_pretrained(folder), Posterior.from_pretrained(folder / "checkpoint-2")
    assert not (folder / "checkpoint-3").exists(), "it was not interrupted"
    for name, draw in drawn.items():
        key = name.replace(".default", "")
        assert torch.equal(saved.mean[key], checkpoint.mean[key])
        assert torch.equal(saved.sigma[key], checkpoint.sigma[key])
        assert not torch.equal(saved.mean[key], draw)
    assert not (folder / "model.safetensors").exists()
