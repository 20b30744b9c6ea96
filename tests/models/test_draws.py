"""Draws in a loaded model against PEFT's own loading, and stacked draws against one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import build_classifier, build_lora, with_sigma
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from axolotl_ivon import IVONError, Posterior, draws, predict, predict_logits
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.variants import paper_variants
from axolotl_ivon.models.draws import AdapterSlots, Stack
from axolotl_ivon.models.session import load_model

MakeAdapter = Callable[..., Path]
ROWS = list(paper_variants(tau=0.5, ratio=0.3).values())
WIDE = ["q_proj", "v_proj", "down_proj"]


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
    with AdapterSlots(model).loaded(other):
        torch.testing.assert_close(model(text).logits, expected(text).logits)
        inside = get_peft_model_state_dict(model)
        assert all(inside[key].equal(other[key]) for key in tensors)
    assert model(text).logits.equal(before)
    assert not torch.allclose(before, expected(text).logits)


def test_loading_refuses_tensors_of_another_adapter(tiny_adapter: Path) -> None:
    model = load_model(tiny_adapter)
    tensors = load_file(tiny_adapter / "adapter_model.safetensors")
    key = min(tensors)
    bad = [
        ({k: v for k, v in tensors.items() if k != key}, f"the adapter has no {key}"),
        ({**tensors, "base_model.model.nothing.lora_A.weight": torch.zeros(1)}, "it has no place for base_model"),
        ({**tensors, key: torch.zeros(2, 2)}, r"is \[2, 2\] in the adapter"),
    ]
    for given, message in bad:
        with pytest.raises(IVONError, match=message):
            AdapterSlots(model).check(given)


@pytest.mark.parametrize(
    "lora", [{"target_modules": WIDE}, {"target_modules": "all-linear", "use_rslora": True}], ids=str
)
def test_stacked_draws_equal_one_at_a_time(make_adapter: MakeAdapter, lora: dict) -> None:
    folder = make_adapter(**lora)
    model, posterior = load_model(folder), Posterior.from_pretrained(folder)
    draws = [posterior.sample(1, member) for member in range(3)]
    text = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    with Stack(model, draws).running(), torch.no_grad():
        together = model(text.repeat(3, 1)).logits
    for draw, part in zip(draws, together.view(3, 4, 9, -1), strict=True):
        with AdapterSlots(model).loaded(draw), torch.no_grad():
            torch.testing.assert_close(part, model(text).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_stacking_refuses_more_than_plain_lora(make_adapter: MakeAdapter, pipeline: Any, lora: dict) -> None:
    evaluation = Evaluation(make_adapter(**lora), EvaluationData([pipeline.chats]))
    evaluation.run(ROWS, Sampling(samples=2))
    with pytest.raises(IVONError, match=r"draws_per_pass 2: .* use draws_per_pass 1"):
        evaluation.run(ROWS, Sampling(samples=2, draws_per_pass=2))


def test_lora_on_fused_experts_is_not_stacked(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 350}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "moe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = with_sigma(build_lora(tmp_path / "moe", tmp_path / "adapter", target_parameters=experts))
    model, q = load_model(folder), Posterior.from_pretrained(folder)
    with pytest.raises(IVONError, match=r"draws_per_pass 2: .*\.experts\..* use draws_per_pass 1"):
        Stack(model, [q.sample(0, k) for k in range(2)])


def test_draws_are_sample_s_and_the_model_is_left_as_it_was(tiny_adapter: Path) -> None:
    q = Posterior.from_pretrained(tiny_adapter)
    model = load_model(tiny_adapter)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with draws(q, model, 3, seed=5) as members:
        for k in members:
            draw = q.sample(seed=5, member=k)
            assert all(value.equal(draw[key]) for key, value in get_peft_model_state_dict(model).items())
    assert k == 2
    assert all(param.equal(before[name]) for name, param in model.named_parameters())
    with pytest.raises(KeyError), draws(q, model, 3) as members:
        for k in members:
            if k:
                raise KeyError
    assert all(param.equal(before[name]) for name, param in model.named_parameters())
    with draws(q, model, 2):
        assert all(value.equal(q.mean[key]) for key, value in get_peft_model_state_dict(model).items())


def test_predict_is_the_average_and_the_mutual_information(tiny_adapter: Path) -> None:
    q = Posterior.from_pretrained(tiny_adapter)
    model = load_model(tiny_adapter).train()
    modes = [module.training for module in model.modules()]
    batch = {"input_ids": torch.arange(3, 43).view(2, 20), "labels": torch.zeros(2, 20).long()}
    averaged = predict_logits(q, model, batch, n=4, seed=2)
    assert predict(q, model, batch, n=4, seed=2).probabilities.equal(averaged.probabilities)  # type: ignore  # its former name
    each = []
    model.eval()
    for k in range(4):
        with AdapterSlots(model).loaded(q.sample(2, k)), torch.no_grad():
            each.append(model(batch["input_ids"]).logits.double().softmax(-1))
    model.train()
    average = torch.stack(each).mean(0)
    entropy = torch.distributions.Categorical(average).entropy()
    expected = entropy - torch.stack([torch.distributions.Categorical(one).entropy() for one in each]).mean(0)
    torch.testing.assert_close(averaged.probabilities.double(), average, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(averaged.disagreement.double(), expected, rtol=1e-2, atol=1e-5)
    assert averaged.disagreement.max() > 1e-3
    assert [module.training for module in model.modules()] == modes
    assert not any(param.requires_grad for param in model.parameters())
    point = predict_logits(q.temper(float("inf")), model, batch, n=3)
    assert point.disagreement.max() < 1e-5


def test_a_model_that_does_not_fit_and_no_draws_are_one_line(tiny_adapter: Path, make_adapter: MakeAdapter) -> None:
    q = Posterior.from_pretrained(tiny_adapter)
    model = load_model(make_adapter(target_modules=["q_proj"]))
    with pytest.raises(IVONError, match="does not fit the adapter"), draws(q, model):
        pass
    with pytest.raises(IVONError, match="n 0 is not a number of draws"):
        predict_logits(q, load_model(tiny_adapter), {"input_ids": torch.ones(1, 3).long()}, n=0)


def test_a_model_that_does_not_read_the_draws_is_refused(tiny_adapter: Path, tiny_llama: Path) -> None:
    q, batch = Posterior.from_pretrained(tiny_adapter), {"input_ids": torch.ones(1, 3).long()}
    model = load_model(tiny_adapter)
    model.merge_adapter()
    with pytest.raises(IVONError, match=r"the model's adapter is merged into it; call unmerge_adapter\(\) first"):
        predict_logits(q, model, batch)
    model.unmerge_adapter()
    model.load_adapter(tiny_adapter, "other")
    model.set_adapter("other")
    with pytest.raises(
        IVONError, match="the model's active adapter is other, and draws go into the one that PEFT calls default"
    ):
        predict_logits(q, model, batch)
    model.set_adapter("default")
    assert predict_logits(q, model, batch, n=1).probabilities.shape == (1, 3, 350)
    with (
        pytest.raises(IVONError, match="the model, a LlamaForCausalLM, is no PeftModel"),
        draws(q, model.get_base_model()),
    ):
        pass
    named: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_adapter, "foo")
    with pytest.raises(IVONError, match="the model's active adapter is foo"):
        predict_logits(q, named, batch)


def test_a_classifier_s_prediction_has_its_classes(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(build_classifier(tiny_llama, tmp_path / "adapter"), classify=True)
    model.config.pad_token_id = 0
    mean = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    q = Posterior(mean, {key: torch.full_like(value, 0.1) for key, value in mean.items()}, {}, {})
    averaged = predict_logits(q, model, {"input_ids": torch.arange(3, 23).view(2, 10)}, n=2)
    assert averaged.probabilities.shape == (2, 3)
    assert averaged.disagreement.shape == (2,)
    torch.testing.assert_close(averaged.probabilities.sum(-1), torch.ones(2))
