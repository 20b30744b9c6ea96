"""A softmax temperature in the weights: the model's own probabilities are then the calibrated ones, in any runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from axolotl_ivon import IVONError
from axolotl_ivon.models.temperature import build_in_temperature

T = 1.7
IDS = torch.tensor([[5, 9, 2, 30], [7, 7, 1, 4]])
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
KINDS = [
    ("llama", {"tie_word_embeddings": False}, "lm_head"),
    ("llama", {"tie_word_embeddings": True}, "model.norm"),
    ("qwen2", {"tie_word_embeddings": True}, "model.norm"),
    ("qwen3", {"tie_word_embeddings": True}, "model.norm"),
    ("mistral", {"tie_word_embeddings": False}, "lm_head"),
    ("gemma", {}, "model.norm"),  # its norm multiplies by 1 + weight
    ("gemma2", {"final_logit_softcapping": 3.0}, "model.norm"),
    ("gemma3_text", {}, "model.norm"),
    ("cohere", {"logit_scale": 0.25}, "model.norm"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "transformer.ln_f"),  # a bias beside the weight
]


def build(kind: str, changes: dict[str, Any], auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("kind", "changes", "place"), KINDS)
def test_logits_are_divided_by_it_after_a_save_too(kind: str, changes: dict, place: str, tmp_path: Path) -> None:
    model = build(kind, changes)
    wanted = logits(model) / T
    assert wanted.abs().max() > 0.1
    assert build_in_temperature(model, T) == place
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)


def test_a_classifier_and_a_small_dtype() -> None:
    classifier = build("llama", {"num_labels": 3}, AutoModelForSequenceClassification)
    wanted = logits(classifier) / T
    assert build_in_temperature(classifier, T) == "score"
    torch.testing.assert_close(logits(classifier), wanted, rtol=1e-4, atol=1e-5)
    model = build("qwen2", {"tie_word_embeddings": True}).bfloat16()
    wanted = logits(model).float().div(T).softmax(-1)
    build_in_temperature(model, T)
    torch.testing.assert_close(logits(model).float().softmax(-1), wanted, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize(("kind", "changes"), [("llama", {"tie_word_embeddings": True}), ("gemma2", {})])
def test_a_model_without_such_a_place_stays_as_it_was(
    kind: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, changes)
    forward = type(model.get_output_embeddings()).forward
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    monkeypatch.setattr(head, "forward", lambda x: forward(head, x) + x.square().mean())  # no function that scales
    before = logits(model)
    with pytest.raises(IVONError, match=r"has no place for a softmax temperature of 1.7 .* merge without it"):
        build_in_temperature(model, T)
    assert torch.equal(logits(model), before)
    assert getattr(model.config, "final_logit_softcapping", None) == cap
    with pytest.raises(IVONError, match="not a positive number"):
        build_in_temperature(model, 0.0)
