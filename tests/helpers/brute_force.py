"""The slow way, one after the other: PEFT's own loading, a draw, a text, a label's token, a row's gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.models.gradients import adapter_parameters
from axolotl_ivon.models.session import load_model


@torch.no_grad()
def label_probabilities(
    model: nn.Module, ids: Sequence[int], labels: Sequence[Sequence[int]], by_length: bool = False
) -> Tensor:
    """Return p(label) / Σ p(label), float64 [labels]; `by_length` of geometric means over the tokens."""
    sums = []
    for label in labels:
        logs = [
            model(torch.tensor([[*ids, *label[:place]]])).logits[0, -1].double().log_softmax(-1)[token]
            for place, token in enumerate(label)
        ]
        sums.append(torch.stack(logs).sum() / (len(logs) if by_length else 1))
    return torch.stack(sums).softmax(-1)


@torch.no_grad()
def draw_probabilities(
    base: str | Path, items: Sequence[EncodedExample], folder: Path | None, draws: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Return the probabilities of each draw, [draws, predictions, classes]; without a folder of the base model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, folder).eval() if folder else model
    members: list[Tensor] = []
    for draw in draws:
        if folder:
            set_peft_model_state_dict(model, dict(draw))
        rows: list[Tensor] = []
        for item in items:
            if item.candidates is not None:
                rows.append(label_probabilities(model, item.ids, item.candidates, item.by_length)[None])
            else:
                rows.append(model(torch.tensor([item.ids])).logits[0, item.positions].double().softmax(-1))
        members.append(torch.cat(rows))
    return torch.stack(members)


@torch.no_grad()
def class_probabilities(base: Path, texts: Sequence[str], folder: Path) -> Tensor:
    """Return the probabilities that an adapter with a head gives three classes, [texts, classes]."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, folder).eval()
    inputs = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts]
    return torch.cat([model(**each).logits.softmax(-1) for each in inputs])


def row_gradients(adapter: Path, data: Path) -> list[tuple[float, dict[str, Tensor], int]]:
    """Return the loss of each row (a sum), its gradients and its answer's tokens, by transformers' own loss."""
    model, tokenizer = load_model(adapter), AutoTokenizer.from_pretrained(adapter)
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rows = []
    for line in data.read_text().splitlines():
        *question, answer = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        labels = tokenizer(answer["content"] + "<|im_end|>")["input_ids"]
        ids, count = torch.tensor([prompt + labels]), len(labels)
        loss = model(input_ids=ids, labels=torch.tensor([[-100] * len(prompt) + labels])).loss * count
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rows.append((float(loss.detach()), dict(zip(parameters, gradients, strict=True)), count))
    return rows
