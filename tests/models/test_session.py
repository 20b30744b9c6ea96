"""Loading a base model, an adapter over it and its tokenizer: what does not fit is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heard import Heard
from tiny import build_classifier, build_llama, write_chats

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import Example, read_examples
from axolotl_ivon.models.session import Loading, Session, load_model, load_tokenizer, pick_device
from axolotl_ivon.posterior.adapter import Adapter

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=24)


@pytest.fixture(scope="module")
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter()


def test_a_session_is_what_the_rest_needs_to_know_of_a_model(adapter: Path, tiny_llama: Path, chats: Path) -> None:
    heard = Heard()
    session = Session.open(Posterior.from_pretrained(adapter), Loading(device="cpu"), heard)
    assert list(heard.counts) == ["loading the base model"]
    assert (session.base_model, session.device.type, session.max_length) == (str(tiny_llama), "cpu", 512)
    assert (session.classify, session.labels, session.classes) == (False, (), len(session.tokenizer))
    examples = read_examples(chats)
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


def test_a_base_model_that_does_not_fit_is_refused_in_one_line(adapter: Path, tmp_path: Path) -> None:
    wide = build_llama(tmp_path / "wide", hidden_size=64)
    deep = build_llama(tmp_path / "deep", num_hidden_layers=3)
    for base, message in (
        (wide, "does not fit the adapter"),
        (deep, "does not fit the adapter"),
        (tmp_path / "nowhere", r"the base model \S+nowhere cannot be loaded"),
    ):
        with pytest.raises(IVONError, match=message) as caught:
            Session.open(Adapter(adapter), Loading(str(base)))
        assert "\n" not in str(caught.value)
        assert "base_model" in str(caught.value)


def test_unusable_devices_are_named() -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(IVONError, match=f"device {device}"):
            pick_device(device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_the_base_model_gets_the_dtype_asked_for(adapter: Path, dtype: str) -> None:
    model = load_model(adapter, Loading(device="cpu", dtype=dtype))
    weight = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight
    assert weight.dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    assert not model.training


def test_unknown_dtypes_are_named(adapter: Path) -> None:
    with pytest.raises(IVONError, match="dtype 'int8' is unknown; choose one of auto, float32"):
        load_model(adapter, Loading(dtype="int8"))


def test_the_tokenizer_beside_the_adapter_comes_before_the_base_models(
    adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    beside = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tokenizer = load_tokenizer(tiny_llama, "unused")
    tokenizer.add_tokens(["<|mood|>"])
    tokenizer.save_pretrained(beside)
    assert len(load_tokenizer(beside, str(tiny_llama))) == len(tokenizer)
    (tmp_path / "bare").mkdir()
    assert len(load_tokenizer(tmp_path / "bare", str(tiny_llama))) == len(tokenizer) - 1
    with pytest.raises(IVONError, match=r"no tokenizer in \S+bare .*; save the tokenizer of training") as caught:
        load_tokenizer(tmp_path / "bare", str(tmp_path / "bare"))
    assert "\n" not in str(caught.value)
