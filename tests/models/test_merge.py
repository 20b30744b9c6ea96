"""A merged model computes what the base model with the adapter computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import build_classifier, build_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.models.merge import check_merge, choose_weights, merge
from axolotl_ivon.models.session import Loading, load_model
from axolotl_ivon.posterior.adapter import Adapter

TOKENS = torch.arange(3, 19)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.mark.parametrize(
    "kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"sigma": False}]
)
def test_the_merged_mean(kind: dict, make_adapter: Callable, tiny_llama: Path, tmp_path: Path):
    folder = make_adapter(**kind)
    adapter = Adapter(folder)
    merge(adapter, adapter.mean, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(merged, AutoModelForCausalLM._model_mapping[type(merged.config)])
    torch.testing.assert_close(logits(merged), peft_logits(tiny_llama, folder), rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_pruned_means_and_draws_are_merged_as_given(tiny_adapter: Path, tiny_llama: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter).prune(0.5)
    q.save_pretrained(tmp_path / "pruned")
    Posterior(q.sample(4), q.sigma, {}, q.config).save_pretrained(tmp_path / "drawn")
    for name, tensors in (("pruned", q.mean), ("drawn", q.draw(4))):
        merge(Adapter(tiny_adapter), tensors, tmp_path / f"{name}-merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        torch.testing.assert_close(logits(merged), peft_logits(tiny_llama, tmp_path / name), rtol=1e-4, atol=1e-5)


def test_dtype_shards_and_another_base(tiny_adapter: Path, tiny_llama: Path, tmp_path: Path):
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.nn.init.normal_(other.lm_head.weight)
    other.bfloat16().save_pretrained(tmp_path / "other")
    adapter = Adapter(tiny_adapter)
    other_base = str(tmp_path / "other")
    merge(adapter, adapter.mean, tmp_path / "out", Loading(other_base, dtype="float16"), max_shard_size="20KB")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float16
    assert torch.equal(merged.lm_head.weight, other.lm_head.weight.half())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    merge(adapter, adapter.mean, tmp_path / "own", Loading(other_base))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "own").dtype == torch.bfloat16
    # The tokenizer is the one beside the adapter: this base model has none.
    assert AutoTokenizer.from_pretrained(tmp_path / "own").chat_template
    name = "tokenizer.json"  # copied without being read, as a damaged one can keep its reader busy for minutes
    assert (tmp_path / "own" / name).read_bytes() == (tiny_adapter / name).read_bytes()
    assert not (tmp_path / "own" / "README.md").exists(), "the adapter's card is not the model's"


@pytest.mark.parametrize("size", ["lots", "0GB"])
def test_a_shard_size_that_is_none_is_refused(size: str, tiny_adapter: Path):
    with pytest.raises(IVONError, match=f"max_shard_size '{size}' is no size"):
        check_merge(Adapter(tiny_adapter), max_shard_size=size)


def test_a_classifier_keeps_its_head(tiny_llama: Path, tmp_path: Path):
    folder = build_classifier(tiny_llama, tmp_path / "adapter")
    merge(Adapter(folder), Adapter(folder).mean, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(load_model(folder, classify=True)), rtol=1e-4, atol=1e-5)


def test_mistakes(tiny_adapter: Path, tiny_llama: Path, tmp_path: Path):
    adapter = Adapter(tiny_adapter)
    small = build_llama(tmp_path / "small", num_hidden_layers=1)
    wide = build_llama(tmp_path / "wide", hidden_size=64)
    for base, message in (
        (tmp_path / "missing", "cannot be loaded.*base_model"),
        (small, "does not fit the adapter"),
        (wide, "does not fit the adapter"),
    ):
        with pytest.raises(IVONError, match=message):
            merge(adapter, adapter.mean, tmp_path / "out", Loading(str(base)))
        assert not (tmp_path / "out").exists()
    for changed, message in (
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"task_type": "X"}, "task_type X"),
    ):
        adapter.config = {**Adapter(tiny_adapter).config, **changed}
        with pytest.raises(IVONError, match=message):
            merge(adapter, adapter.mean, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert AutoModelForCausalLM.from_pretrained(tiny_llama).dtype == torch.float32


def test_the_weights_that_are_merged(tiny_adapter: Path, make_adapter: Callable) -> None:
    def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    held, q = Adapter(tiny_adapter), Posterior.from_pretrained(tiny_adapter)
    assert same(choose_weights(held), q.mean)
    assert same(choose_weights(held, ratio=0.4), q.prune(0.4).mean)
    assert same(choose_weights(held, 0.4, 3), q.prune(0.4).sample(3))
    assert same(choose_weights(held, sample_seed=3, tau=4.0), q.temper(4.0).sample(3))
    plain = Adapter(make_adapter(sigma=False))
    assert same(choose_weights(plain), plain.mean)
    with pytest.raises(IVONError, match="it is no posterior"):
        choose_weights(plain, sample_seed=0)
