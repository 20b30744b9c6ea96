"""A tiny Llama with its tokenizer, and tiny chat data, built from nothing: the tests need no download."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "red",
    "blue",
    "green",
    "sun",
    "moon",
    "rain",
    "dog",
    "cat",
    "bird",
    "warm",
    "cold",
    "fast",
    "slow",
    "good",
    "bad",
    "yes",
    "no",
    "one",
    "two",
    "three",
]


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
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **config,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            max_position_embeddings=512,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            tie_word_embeddings=False,
            **shape,
        )
    )
    model.save_pretrained(folder)
    return folder


def write_chats(path: str | Path, count: int = 32, seed: int = 0) -> Path:
    """Write `count` one-turn chats whose answer, "A" or "B", follows from the first word of the question."""
    path = Path(path)
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = [draw.choice(WORDS) for _ in range(draw.randint(3, 8))]
            answer = "A" if WORDS.index(words[0]) < len(WORDS) // 2 else "B"
            messages = [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
