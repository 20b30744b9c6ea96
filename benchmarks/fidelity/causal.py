"""The causal model of the fidelity suite: SmolLM2's logits of the choices, made to be trained many times on a CPU.

As the paper does it, the answer to a prompt is read from the logits of the choices after its last token. Three savings
change nothing of the result but its rounding: what the layers below LoRA compute is computed once and kept; the texts
of a batch lie one after another without padding; and the last layer is computed for the last tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Example, collate


def frozen_dtype() -> torch.dtype:
    """Return bfloat16 where the CPU multiplies it in hardware, which is three times as fast, else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class Causal(nn.Module):
    """A Llama with LoRA on its upper layers; takes a batch of `collate` and returns logits (batch, classes), float32.

    `choices` are the token ids of the classes. LoRA's weights are float32, the frozen ones `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        choices: Sequence[int],
        seed: int,
        rank: int,
        targets: Sequence[str],
        dropout: float,
        upper: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or frozen_dtype())
        layers = base.config.num_hidden_layers
        self.frozen = layers - upper
        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules=list(targets),
            layers_to_transform=list(range(self.frozen, layers)),
            layers_pattern="layers",
            task_type="CAUSAL_LM",
        )
        self.peft: Any = get_peft_model(base, lora, autocast_adapter_dtype=True)
        self.choices = base.lm_head.weight[list(choices)].detach().float()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the choices after each text, float32 (batch, classes); of answers, for every token."""
        model = self.peft.base_model.model.model
        mask = batch["mask"]
        lengths = mask.sum(1)
        hidden = batch["hidden"][mask] if "hidden" in batch else self.lower(batch)
        last = lengths.cumsum(0) - 1
        if "answers" in batch:  # the tokens that a token of an answer follows
            ends = torch.repeat_interleave(last, batch["answers"])
            before = torch.cat([torch.arange(count - 1, -1, -1) for count in batch["answers"].tolist()])
            last = ends - before
        # oneDNN compiles a kernel for every number of tokens; of few numbers, few: a quarter of the time.
        rest = -len(hidden) % TOKENS
        hidden, lengths = F.pad(hidden, (0, 0, 0, rest)), F.pad(lengths, (0, 1), value=rest)
        layout = self.layout(lengths, hidden.dtype)
        for layer in model.layers[self.frozen : -1]:
            hidden = self.layer(layer, hidden, layout)
        hidden = self.layer(model.layers[-1], hidden, layout, last)
        return F.linear(model.norm(hidden).float(), self.choices)

    def lower(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the layers below LoRA make of a batch, (tokens of all texts, hidden)."""
        model = self.peft.base_model.model.model
        mask = batch["mask"]
        hidden = model.embed_tokens(batch["input_ids"][mask])
        layout = self.layout(mask.sum(1), hidden.dtype)
        for layer in model.layers[: self.frozen]:
            hidden = self.layer(layer, hidden, layout)
        return hidden

    def layout(self, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotary embedding's cosines and sines for texts of these lengths, and who may attend to whom."""
        model = self.peft.base_model.model.model
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position = torch.arange(len(text)) - (lengths.cumsum(0) - lengths)[text]
        cos, sin = model.rotary_emb(torch.zeros(1, dtype=dtype), position[None])
        return cos[0], sin[0], (text[:, None] == text) & (position[:, None] >= position)

    def layer(
        self, layer: Any, hidden: Tensor, layout: tuple[Tensor, Tensor, Tensor], only: Tensor | None = None
    ) -> Tensor:
        """Return a layer's output for all tokens (tokens, hidden), or for those in `only`."""
        attention, (cos, sin, mask) = layer.self_attn, layout
        normed = layer.input_layernorm(hidden)
        rows = slice(None) if only is None else only
        query, key, value = (
            projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for projection, x in (
                (attention.q_proj, normed[rows]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        query, key = _rotate(query, cos[rows], sin[rows]), _rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask[rows], scale=attention.scaling, enable_gqa=True
        )
        hidden = hidden[rows] + attention.o_proj(mixed[0].transpose(0, 1).flatten(1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    @torch.no_grad()
    def freeze(self, examples: Sequence[Example], size: int = 16) -> list[Example]:
        """Return the examples with what the layers below LoRA make of each."""
        frozen = []
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            parts = self.lower(collate(chunk)).split([len(example.ids) for example in chunk])
            frozen += [replace(example, hidden=part.clone()) for example, part in zip(chunk, parts, strict=True)]
        return frozen

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: value for name, value in self.peft.named_parameters() if value.requires_grad}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


TOKENS = 32  # the tokens of a batch are filled up to a multiple of this by a text of nothing
