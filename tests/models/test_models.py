"""A base model and an adapter over it: loaded together, called, and merged into one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heard import Heard
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build_classifier, build_llama, build_lora
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import Example, read_examples
from axolotl_ivon.models.forward import cache_name, forward_parameters
from axolotl_ivon.models.merge import choose_weights, merge
from axolotl_ivon.models.session import Loading, Session, load_model, load_tokenizer, pick_device
from axolotl_ivon.posterior.adapter import Adapter

MakeAdapter = Callable[..., Path]


def test_a_session_is_what_the_rest_needs_to_know_of_a_model(
    tiny_adapter: Path, tiny_llama: Path, pipeline: Any
) -> None:
    heard = Heard()
    session = Session.open(Posterior.from_pretrained(tiny_adapter), Loading(device="cpu"), heard)
    assert list(heard.counts) == ["loading the base model"]
    assert (session.base_model, session.device.type, session.max_length) == (str(tiny_llama), "cpu", 512)
    assert (session.classify, session.labels, session.classes) == (False, (), len(session.tokenizer))
    examples = read_examples(pipeline.chats)
    choice = session.encode(examples, "choice", ["A", "B"])
    assert {len(item.candidates or ()) for item in choice} == {2}
    for item, example in zip(session.encode_for_training(examples), examples, strict=True):
        assert session.tokenizer.decode(item.targets) == f"{example.answer}<|im_end|>"
    with pytest.raises(IVONError, match=r"chat 7: token 999 is new to the base model"):
        session.check_tokens([3, 999], "chat 7")


def test_a_session_of_a_classifier_has_its_labels_and_finds_the_end_of_a_text(tiny_llama: Path, tmp_path: Path) -> None:
    labels = {"rain": 2, "warm": 0, "cold": 1}
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    names = {str(number): label for label, number in labels.items()}
    (base / "config.json").write_text(
        json.dumps({**config, "pad_token_id": None, "id2label": names, "label2id": labels})
    )
    build_classifier(base, tmp_path / "adapter")
    session = Session.open(Adapter(tmp_path / "adapter"))
    assert (session.classify, session.labels, session.classes) == (True, ("warm", "cold", "rain"), 3)
    assert session.model.config.pad_token_id == session.tokenizer.pad_token_id
    examples = [Example(({"role": "user", "content": "red"},), answer, "x:1", plain=True) for answer in ("cold", "2")]
    for items in (session.encode(examples, "classify"), session.encode_for_training(examples)):
        assert [item.targets for item in items] == [[1], [2]]
    empty = Example(({"role": "user", "content": ""},), "cold", "x:2", plain=True)  # its tokenizer begins with no token
    with pytest.raises(IVONError, match=r"^x:2: the text has no tokens"):
        session.encode([*examples, empty], "classify")


def test_a_base_model_that_does_not_fit_is_refused_in_one_line(tiny_adapter: Path, tmp_path: Path) -> None:
    wide = build_llama(tmp_path / "wide", hidden_size=64)
    deep = build_llama(tmp_path / "deep", num_hidden_layers=3)
    for base, message in (
        (wide, "does not fit the adapter"),
        (deep, "does not fit the adapter"),
        (tmp_path / "nowhere", r"the base model \S+nowhere cannot be loaded"),
    ):
        with pytest.raises(IVONError, match=message) as caught:
            Session.open(Adapter(tiny_adapter), Loading(str(base)))
        assert "\n" not in str(caught.value)
        assert "base_model" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_the_base_model_gets_the_dtype_asked_for(tiny_adapter: Path, dtype: str) -> None:
    model = load_model(tiny_adapter, Loading(device="cpu", dtype=dtype))
    weight = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight
    assert weight.dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    assert not model.training


def test_unusable_devices_and_unknown_dtypes_are_named() -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(IVONError, match=f"device {device}"):
            pick_device(device)
    with pytest.raises(IVONError, match="dtype 'int8' is unknown; choose one of auto, float32"):
        Loading(dtype="int8")


def test_the_tokenizer_beside_the_adapter_comes_before_the_base_models(
    tiny_adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    beside = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    tokenizer = load_tokenizer(tiny_llama, "unused")
    tokenizer.add_tokens(["<|mood|>"])
    tokenizer.save_pretrained(beside)
    assert len(load_tokenizer(beside, str(tiny_llama))) == len(tokenizer)
    (tmp_path / "bare").mkdir()
    assert len(load_tokenizer(tmp_path / "bare", str(tiny_llama))) == len(tokenizer) - 1
    with pytest.raises(IVONError, match=r"no tokenizer in \S+bare .*; save the tokenizer of training") as caught:
        load_tokenizer(tmp_path / "bare", str(tmp_path / "bare"))
    assert "\n" not in str(caught.value)


def test_the_cache_is_called_as_the_signature_says() -> None:
    def name(forward: Any) -> str:
        model: Any = SimpleNamespace(get_base_model=lambda: SimpleNamespace(forward=forward))
        return cache_name(forward_parameters(model))

    assert name(lambda input_ids, cache=None: None) == "cache"
    assert name(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert name(lambda input_ids: None) == "past_key_values"


TOKENS = torch.arange(3, 19)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [4, 5]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"sigma": False},
    ],
    ids=str,
)
def test_the_merged_mean(kind: dict, make_adapter: MakeAdapter, tiny_llama: Path, tmp_path: Path):
    folder = make_adapter(**kind)
    adapter = Adapter(folder)
    merge(adapter, adapter.mean, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(merged, AutoModelForCausalLM._model_mapping[type(merged.config)])
    torch.testing.assert_close(logits(merged), peft_logits(tiny_llama, folder), rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"lm_head": [3, 5]}},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 7]}},
    ],
    ids=str,
)
def test_of_tied_embeddings_each_side_has_its_own_update(kind: dict, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    base = build_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = Adapter(build_lora(base, tmp_path / "adapter", noise=0.1, **kind))
    expected = logits(load_model(tmp_path / "adapter"))
    recwarn.clear()
    merge(adapter, adapter.mean, tmp_path / "out", temperature=2.0)
    assert not [w for w in recwarn if "tie" in str(w.message)]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    torch.testing.assert_close(2 * logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [350, 352]}])
def test_a_vocabulary_that_training_extended(kind: dict, tiny_llama: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(353, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **kind}))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    adapter = Adapter(tmp_path / "adapter")
    merge(adapter, adapter.mean, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[3, 352, 7, 350]])
    with torch.no_grad():  # the output layer's new rows are saved with trainable tokens alone
        found, expected = (each.eval()(tokens).logits[..., :350] for each in (merged, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pruned_means_and_draws_are_merged_as_given(tiny_adapter: Path, tiny_llama: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter).prune(0.5)
    q.save_pretrained(tmp_path / "pruned")
    Posterior(q.sample(4), q.sigma, {}, q.config).save_pretrained(tmp_path / "drawn")
    for name, tensors in (("pruned", q.mean), ("drawn", q.draw(4))):
        merge(Adapter(tiny_adapter), tensors, tmp_path / f"{name}-merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        torch.testing.assert_close(logits(merged), peft_logits(tiny_llama, tmp_path / name), rtol=1e-4, atol=1e-5)


def test_dtype_shards_and_another_base(
    tiny_adapter: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("axolotl_ivon.models.merge._SHARD", "20KB")
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.nn.init.normal_(other.lm_head.weight)
    other.bfloat16().save_pretrained(tmp_path / "other")
    adapter = Adapter(tiny_adapter)
    other_base = str(tmp_path / "other")
    merge(adapter, adapter.mean, tmp_path / "out", Loading(other_base, dtype="float16"))
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


def test_a_classifier_keeps_its_head(tiny_llama: Path, tmp_path: Path):
    folder = build_classifier(tiny_llama, tmp_path / "adapter")
    merge(Adapter(folder), Adapter(folder).mean, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(load_model(folder, classify=True)), rtol=1e-4, atol=1e-5)


def test_nothing_is_written_of_what_cannot_be_merged(tiny_adapter: Path, tmp_path: Path):
    small = build_llama(tmp_path / "small", num_hidden_layers=1)
    for base, changed, message in (
        (str(small), {}, "does not fit the adapter"),
        (str(tmp_path / "missing"), {}, "cannot be loaded.*base_model"),
        (None, {"base_model_name_or_path": None}, "names no base model"),
        (None, {"task_type": "X"}, "task_type X"),
        (None, {"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING, which changes the prompt and no weight"),
    ):
        adapter = Adapter(tiny_adapter)
        adapter.config = {**adapter.config, **changed}
        with pytest.raises(IVONError, match=message):
            merge(adapter, adapter.mean, tmp_path / "out", Loading(base))
        assert not (tmp_path / "out").exists()


def test_a_base_that_is_stored_quantized_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=options, device_map={"": "cpu"})
    base.save_pretrained(tmp_path / "base")
    adapter = Adapter(build_lora(tiny_llama, tmp_path / "adapter"))
    with pytest.raises(IVONError, match=r"is stored quantized.*base_model"):
        merge(adapter, adapter.mean, tmp_path / "out", Loading(str(tmp_path / "base")))
    assert not (tmp_path / "out").exists()


def test_the_base_models_way_to_generate_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    """Transformers reads a temperature without do_sample, as many public models have it, but does not write it."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    own = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(own))
    adapter = Adapter(build_lora(base, tmp_path / "adapter"))
    merge(adapter, adapter.mean, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert own.items() <= {"do_sample": False, **written}.items()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (read.temperature, read.top_p, bool(read.do_sample), read.eos_token_id) == (0.6, 0.9, False, 2)


def test_the_weights_that_are_merged(tiny_adapter: Path, make_adapter: MakeAdapter) -> None:
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
