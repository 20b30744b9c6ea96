"""Draws in a loaded model against PEFT's own loading, and stacked draws against one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import write_chats
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.evaluation.evaluate import Evaluation, rows_of
from axolotl_ivon.models.load import load_model
from axolotl_ivon.models.swap import loaded, stacked

MakeAdapter = Callable[..., Path]
ROWS = list(rows_of(tau=0.5, ratio=0.3).values())
WIDE = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=24)


@pytest.fixture(scope="module")
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter()


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_slots_are_what_peft_saves_and_loads(make_adapter: MakeAdapter, tiny_llama: Path, lora: dict) -> None:
    folder = make_adapter(**lora)
    model = load_model(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    other = {key: torch.randn_like(tensor) for key, tensor in tensors.items()}
    text = torch.arange(3, 40)[None]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder).eval()
    set_peft_model_state_dict(expected, dict(other))
    before = model(text).logits
    with loaded(model, other):
        torch.testing.assert_close(model(text).logits, expected(text).logits)
        inside = get_peft_model_state_dict(model)
        assert all(inside[key].equal(other[key]) for key in tensors)
    assert model(text).logits.equal(before)
    assert not torch.allclose(before, expected(text).logits)


def test_loading_refuses_tensors_of_another_adapter(adapter: Path) -> None:
    model = load_model(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = min(tensors)
    bad = [
        ({k: v for k, v in tensors.items() if k != key}, f"the adapter has no {key}"),
        ({**tensors, "base_model.model.nothing.lora_A.weight": torch.zeros(1)}, "it has no place for base_model"),
        ({**tensors, key: torch.zeros(2, 2)}, r"is \[2, 2\] in the adapter"),
    ]
    for given, message in bad:
        with pytest.raises(IVONError, match=message), loaded(model, given):
            pytest.fail("must not be loaded")


@pytest.mark.parametrize(
    "lora", [{"target_modules": WIDE}, {"target_modules": "all-linear", "use_rslora": True}], ids=str
)
def test_stacked_draws_equal_one_at_a_time(make_adapter: MakeAdapter, lora: dict) -> None:
    folder = make_adapter(**lora)
    model, posterior = load_model(folder), Posterior.from_pretrained(folder)
    draws = [posterior.sample(1, member) for member in range(3)]
    text = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    with stacked(model, draws), torch.no_grad():
        together = model(text.repeat(3, 1)).logits
    for draw, part in zip(draws, together.view(3, 4, 9, -1), strict=True):
        with loaded(model, draw), torch.no_grad():
            torch.testing.assert_close(part, model(text).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_stacking_refuses_more_than_plain_lora(make_adapter: MakeAdapter, chats: Path, lora: dict) -> None:
    evaluation = Evaluation(make_adapter(**lora), [chats])
    evaluation.run(ROWS, samples=2)
    with pytest.raises(IVONError, match=r"draws_per_pass 2: .* use draws_per_pass 1"):
        evaluation.run(ROWS, samples=2, draws_per_pass=2)
