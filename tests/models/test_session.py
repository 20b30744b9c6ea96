"""Loading a base model, an adapter over it and its tokenizer: what does not fit is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build_llama, write_chats

from axolotl_ivon import IVONError
from axolotl_ivon.evaluation.evaluate import Evaluation, Variant
from axolotl_ivon.models.session import Loading, load_model, load_tokenizer, pick_device

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=24)


@pytest.fixture(scope="module")
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter()


def test_a_base_model_that_does_not_fit_is_refused_in_one_line(
    adapter: Path, chats: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    wide = build_llama(tmp_path / "wide", hidden_size=64)
    deep = build_llama(tmp_path / "deep", num_hidden_layers=3)
    for base in (wide, deep):
        with pytest.raises(IVONError, match="does not fit the adapter") as caught:
            Evaluation(adapter, [chats], base_model=str(base)).run([Variant("mean")])
        assert "\n" not in str(caught.value)
        assert "base_model" in str(caught.value)
    with pytest.raises(IVONError, match=r"the base model \S+nowhere cannot be loaded") as caught:
        Evaluation(adapter, [chats], base_model=str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


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
