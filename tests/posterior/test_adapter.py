"""An adapter folder: the fingerprint of its mean, the σ that is put beside it, the modules of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs import FOLDERS
from safetensors.torch import load_file

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.adapter import Adapter, mean_sha256, module_of, modules, save_sigma
from axolotl_ivon.posterior.tensors import Tensors
from axolotl_ivon.storage.format import SIGMA_FILE


def test_fingerprint_covers_names_dtypes_shapes_and_values():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    expected = mean_sha256(tensors)
    assert mean_sha256(dict(reversed(tensors.items()))) == expected
    assert mean_sha256({**tensors, "a": tensors["a"].clone().t().contiguous().t()}) == expected
    changed = [
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "b": tensors["b"].view(torch.int32)},
        {**tensors, "b": torch.tensor([1, 1, 1 + 2**-23])},
        {"a": tensors["a"]},
        {**tensors, "c": torch.ones(0)},
    ]
    assert len({expected, *map(mean_sha256, changed)}) == len(changed) + 1
    # Adapters on people's disks carry it: it must never change.
    assert expected == "5618b2f326cb0c838705ff8598e4917cd34980fc187a45ebd7944acf35ac5ebe"


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_damaged_folder_is_no_posterior(
    damage: str, tiny_adapter: Path, copied: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = copied(tiny_adapter)
    break_it, message = FOLDERS[damage]
    break_it(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IVONError, match=re.escape(message)):
        Posterior.from_pretrained(folder)
    assert not (tmp_path / "evil").exists(), "a pickle was run"


def test_save_sigma_refuses_what_does_not_fit(tiny_adapter: Path, copied: Callable):
    folder = copied(tiny_adapter)
    before = (folder / SIGMA_FILE).read_bytes()
    sigma = load_file(folder / SIGMA_FILE)
    for bad, message in (
        ({**sigma, "other": torch.ones(1)}, "σ for other"),
        ({k: -v for k, v in sigma.items()}, "≥ 0"),
    ):
        with pytest.raises(IVONError, match=message):
            save_sigma(folder, bad, {})
    assert (folder / SIGMA_FILE).read_bytes() == before


def test_an_adapter_without_sigma_is_one(make_adapter: Callable):
    adapter = Adapter(make_adapter(sigma=False))
    assert (adapter.sigma, adapter.metadata) == (None, {})
    assert len(adapter.digests()) == len(adapter.mean) == 8


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "model.layers.0.self_attn.q_proj"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens"),
        ("base_model.model.lm_head.weight", "lm_head"),
        ("base_model.model.q_proj.bias", "q_proj"),
        ("odd", "odd"),
    ],
)
def test_module_names(key: str, module: str):
    assert module_of(key) == module


def test_modules_come_in_their_natural_order():
    keys = [f"base_model.model.layers.{i}.q.lora_{factor}.weight" for i in (10, 2) for factor in "BA"]
    found = modules(Tensors.of({key: torch.zeros(1) for key in keys}))
    assert list(found) == ["layers.2.q", "layers.10.q"]
    assert all(names == sorted(names) and len(names) == 2 for names in found.values())
