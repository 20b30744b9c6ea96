"""An adapter folder: the fingerprint of its mean, the σ that is put beside it, the modules of its tensors."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.adapter import Adapter, mean_sha256, modules, save_sigma
from axolotl_ivon.posterior.tensors import Tensors
from axolotl_ivon.storage.format import MEAN_FILE, SIGMA_FILE


def change(name: str, edit: Callable[[dict[str, torch.Tensor]], object], **header: str) -> Callable[[Path], None]:
    """A damage to one file alone: `edit` gets its tensors, `header` goes into its header."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        edit(tensors)
        with safe_open(folder / name, "pt") as file:
            header_before = file.metadata()
        save_file(tensors, folder / name, {**header_before, **header})

    return damage


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[min(tensors)].__setitem__((0, 0), value)


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / MEAN_FILE), folder / "adapter_model.bin")
    (folder / MEAN_FILE).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil"),))


HUGE = (2**60).to_bytes(8, "little") + b"{}"
OVERLAP = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}).encode()

# What is done to the folder, and what the message says.
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (remove("adapter_config.json"), "has no adapter_config.json"),
    "configuration is no text": (write("adapter_config.json", b"\xff\xfe"), "is not valid JSON"),
    "no safetensors": (remove(MEAN_FILE), f"has no {MEAN_FILE}"),
    "pickle instead of safetensors": (only_pickle, "as a pickle, which is never read; convert it"),
    "pickle under its name": (write(MEAN_FILE, pickle.dumps(Evil())), f"{MEAN_FILE} is not a complete safetensors"),
    "no sigma": (remove(SIGMA_FILE), f"has no {SIGMA_FILE}, so it is no posterior"),
    "sigma is a pickle": (write(SIGMA_FILE, pickle.dumps(Evil())), f"{SIGMA_FILE} is not a complete safetensors"),
    "truncated mean": (truncate(MEAN_FILE, 3000), f"{MEAN_FILE} is not a complete safetensors"),
    "truncated sigma": (truncate(SIGMA_FILE, 3000), f"{SIGMA_FILE} is not a complete safetensors"),
    "truncated header": (truncate(SIGMA_FILE, 100), f"{SIGMA_FILE} is not a complete safetensors"),
    "huge header": (write(SIGMA_FILE, HUGE), f"{SIGMA_FILE} is not a complete safetensors"),
    "shape beyond the file": (
        write(SIGMA_FILE, len(OVERLAP).to_bytes(8, "little") + OVERLAP + bytes(8)),
        f"{SIGMA_FILE} is not a complete safetensors",
    ),
    "sigma of other shape": (
        change(SIGMA_FILE, lambda t: t.update({min(t): torch.ones(3, 3)})),
        "q_proj.lora_A.weight has shape [3, 3], its mean [4, 32]; put files of one save together",
    ),
    "sigma of other dtype": (
        change(SIGMA_FILE, lambda t: t.update({min(t): t[min(t)].double()})),
        "has dtype F64; it must be F32",
    ),
    "missing key": (change(SIGMA_FILE, lambda t: t.pop(min(t))), "no σ for base_model"),
    "extra key": (change(SIGMA_FILE, lambda t: t.update({"../x": torch.ones(1)})), "σ for ../x, which"),
    "NaN sigma": (change(SIGMA_FILE, fill(math.nan)), "holds NaN or infinite values"),
    "infinite sigma": (change(SIGMA_FILE, fill(math.inf)), "holds NaN or infinite values"),
    "negative sigma": (change(SIGMA_FILE, fill(-0.1)), "has negative values"),
    "sigma beside another mean": (change(MEAN_FILE, fill(9.0)), "belongs to another adapter_model.safetensors"),
    "NaN mean": (change(MEAN_FILE, fill(math.nan)), "self_attn.q_proj.lora_A.weight holds NaN"),
    "not our file": (change(SIGMA_FILE, dict, format="other"), "format is 'other'"),
    **{
        f"format version {version}": (
            change(SIGMA_FILE, dict, format_version=version),
            f"{SIGMA_FILE}: format_version is '{version}'; this version of axolotl-ivon reads '1'",
        )
        for version in ("2", "10", "1.1", "")
    },
    "tau is no number": (change(SIGMA_FILE, dict, tau="warm"), "tau is 'warm'"),
    "tau is 0 in the header": (change(SIGMA_FILE, dict, tau="0"), "tau is '0'"),
    "ratio is no ratio": (change(SIGMA_FILE, dict, pruned_ratio="7"), "pruned_ratio is '7'"),
}


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


def test_an_adapter_without_sigma_is_one(plain_adapter: Path):
    adapter = Adapter(plain_adapter)
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
    assert modules(Tensors.of({key: torch.zeros(1)})) == {module: [key]}


def test_modules_come_in_their_natural_order():
    keys = [f"base_model.model.layers.{i}.q.lora_{factor}.weight" for i in (10, 2) for factor in "BA"]
    found = modules(Tensors.of({key: torch.zeros(1) for key in keys}))
    assert list(found) == ["layers.2.q", "layers.10.q"]
    assert all(names == sorted(names) and len(names) == 2 for names in found.values())
