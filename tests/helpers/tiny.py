"""A tiny Llama with its tokenizer, and tiny chat data, built from nothing: the tests need no download."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from axolotl_ivon.data.chats import Example
from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.posterior.adapter import save_sigma

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# fmt: off
WORDS = [
    "red", "blue", "green", "sun", "moon", "rain", "dog", "cat", "bird", "warm", "cold", "fast", "slow", "good", "bad",
    "yes", "no", "one", "two", "three",
]
# fmt: on


def build_llama(folder: str | Path, seed: int = 0, **config: int) -> Path:
    """Write a two-layer Llama (hidden size 32) and a byte-level BPE tokenizer with a chat template."""
    folder = Path(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        [" ".join(WORDS), "user assistant system positive negative A B C D"] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {f"{name}_token_id": getattr(fast, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"vocab_size": len(fast), "max_position_embeddings": 512, "tie_word_embeddings": False, **tokens, **sizes}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "num_key_value_heads": 2, **config}))
    model.save_pretrained(folder)
    return folder


def build_classifier(base: str | Path, folder: str | Path, **config: Any) -> Path:
    """Write a random adapter on the queries with a classification head, by default of three labels, and the tokenizer.

    `config` is of the base model.
    """
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, **{"num_labels": 3, **config})
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return Path(folder)


def build_lora(base: str | Path, folder: str | Path, dtype: str = "float32", noise: float = 0, **lora: Any) -> Path:
    """Write a random LoRA adapter over a model, with normal `noise` on its weights, and the tokenizer."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**settings, **lora}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return Path(folder)


def with_sigma(
    folder: Path,
    sigma: Callable[[torch.Tensor], torch.Tensor] = lambda mean: torch.full_like(mean, 0.02),
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write σ, a function of each tensor of the mean, beside an adapter, and return its folder."""
    mean = load_file(folder / "adapter_model.safetensors")
    save_sigma(folder, {key: sigma(value) for key, value in mean.items()}, facts)
    return folder


def random_examples(count: int = 5) -> list[EncodedExample]:
    """Return texts of random tokens, of different lengths, some of which are labels."""
    draw = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        ids = torch.randint(3, 200, (6 + 3 * number,), generator=draw).tolist()
        positions = list(range(2 + number, len(ids) - 1, 1 + number % 2))
        items.append(EncodedExample(ids, positions, [ids[position + 1] for position in positions]))
    return items


def example_of(answer: str, question: str = "red sun") -> Example:
    """Return a chat of one turn, as it is read from a file."""
    return Example(({"role": "user", "content": question},), answer, "f:1")


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Return a line of chat data, of one turn."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_chats(path: str | Path, count: int = 32, seed: int = 0) -> Path:
    """Write `count` one-turn chats whose answer, "A" or "B", follows from the first word of the question."""
    path = Path(path)
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = [draw.choice(WORDS) for _ in range(draw.randint(3, 8))]
            answer = "A" if WORDS.index(words[0]) < len(WORDS) // 2 else "B"
            file.write(json.dumps(chat(" ".join(words), answer)) + "\n")
    return path
