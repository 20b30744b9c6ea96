"""Posteriors over real PEFT adapters: what is read, changed and written is held against PEFT and plain torch."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.adapter import mean_sha256, save_sigma
from axolotl_ivon.posterior.posterior import open_posterior
from axolotl_ivon.storage.format import MEAN_FILE, SIGMA_FILE


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def toy(dtype: torch.dtype = torch.float32) -> Posterior:
    torch.manual_seed(0)
    mean = {"a.lora_A.weight": torch.randn(100, 2).to(dtype), "b": torch.randn(7)}
    sigma = {key: torch.rand(value.shape) + 0.1 for key, value in mean.items()}
    return Posterior(mean, sigma, {"ess": "10", "extra": "kept"}, {"peft_type": "LORA"})


def test_what_is_read_is_what_peft_saved_and_is_written_again(tiny_adapter: Path, tmp_path: Path):
    Posterior.from_pretrained(tiny_adapter).save_pretrained(tmp_path / "out")
    for folder in (tiny_adapter, tmp_path / "out"):
        q = Posterior.from_pretrained(folder)
        assert same(dict(q.mean), load_file(tiny_adapter / MEAN_FILE))
        assert same(dict(q.sigma), load_file(tiny_adapter / SIGMA_FILE))
        with safe_open(tiny_adapter / SIGMA_FILE, "pt") as file:
            assert q.metadata == file.metadata()
        assert q.config == json.loads((tiny_adapter / "adapter_config.json").read_text())
    for name in ("tokenizer.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_adapter / name).read_bytes()


@pytest.mark.parametrize("change", [lambda q: q, lambda q: q.prune(0.2).temper(3)], ids=["as it is", "changed"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copied", "pickled"])
def test_a_copy_is_the_same_posterior(
    change: Callable[[Posterior], Posterior],
    again: Callable[[Posterior], Posterior],
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    for number, q in enumerate(map(change, (Posterior.from_pretrained(tiny_adapter), toy(torch.bfloat16)))):
        made = again(q)
        assert same(dict(made.mean), dict(q.mean))
        assert same(dict(made.sigma), dict(q.sigma))
        assert (made.metadata, made.config, made.tau, made.pruned()) == (q.metadata, q.config, q.tau, q.pruned())
        for name, each in {"first": q, "again": made}.items():
            each.save_pretrained(tmp_path / f"{name}-{number}")
        for name in (MEAN_FILE, SIGMA_FILE):
            files = [(tmp_path / f"{which}-{number}" / name).read_bytes() for which in ("first", "again")]
            assert files[0] == files[1]


def test_a_file_of_sigma_has_the_fingerprint_of_what_was_trained(tmp_path: Path) -> None:
    q = toy()
    for name, made in {"first": q, "tempered": q.temper(4), "other": replace(q, sigma=dict(q.temper(4).sigma))}.items():
        made.save_pretrained(tmp_path / name)
    first = Posterior.from_pretrained(tmp_path / "first")
    first.temper(2).prune(0.3).save_pretrained(tmp_path / "of first")
    replace(first, sigma=dict(first.temper(4).sigma)).save_pretrained(tmp_path / "another")
    at = {path.name: Posterior.from_pretrained(path) for path in tmp_path.iterdir()}
    sha = {name: posterior.metadata["sigma_sha256"] for name, posterior in at.items()}
    assert sha["first"] == sha["of first"] == mean_sha256(q.sigma)
    assert sha["other"] == sha["another"] == mean_sha256(q.temper(4).sigma)


def test_a_change_to_its_tensors_does_not_reach_a_posterior() -> None:
    mean, sigma = {"a": torch.ones(2), "b": torch.ones(2).bfloat16()}, {"a": torch.ones(2), "b": torch.ones(2)}
    q = Posterior(mean, sigma, {}, {})
    for tensor in (*mean.values(), *sigma.values(), *q.mean.values(), *q.sigma.values(), *q.sample().values()):
        tensor.fill_(7)
    assert all(bool((tensor == 1).all()) for tensor in (*q.mean.values(), *q.sigma.values()))


def test_a_checkpoint_is_an_adapter_but_its_optimizer_stays(tiny_adapter: Path, copied: Callable, tmp_path: Path):
    folder = copied(tiny_adapter, "checkpoint-5")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    (folder / "trainer_state.json").write_text("{}")
    Posterior.from_pretrained(folder).save_pretrained(tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in folder.iterdir()} - {"optimizer.pt", "trainer_state.json"}


def test_no_input_is_ever_modified(tiny_adapter: Path, make_adapter: Callable, copied: Callable, tmp_path: Path):
    folders = [copied(tiny_adapter), copied(make_adapter(seed=1), "other")]
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    q, other = map(Posterior.from_pretrained, folders)
    q.mean["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].zero_()
    q.prune(0.5).temper(3).save_pretrained(tmp_path / "out")
    for changed, folder in ((q.prune(0.5), 0), (Posterior.combine([q, other]), 0), (Posterior.combine([q, other]), 1)):
        with pytest.raises(IVONError, match="never modified"):
            changed.save_pretrained(folders[folder], overwrite=True)
    assert {path: path.read_bytes() for folder in folders for path in folder.iterdir()} == before


def test_the_library_needs_no_pydantic_and_no_torch_until_a_tensor_is_asked_for(tiny_adapter: Path, tmp_path: Path):
    script = (
        "import sys; from axolotl_ivon import Posterior; "
        f"q = Posterior.from_pretrained({str(tiny_adapter)!r}).prune(0.1).temper(2); "
        f"q.save_pretrained({str(tmp_path / 'out')!r}); assert not {{'torch', 'pydantic'}} & set(sys.modules); "
        "next(iter(q.mean.values())); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_fields_are_frozen_and_replaced():
    q = toy()
    for name in ("mean", "sigma", "metadata", "config", "folder", "inputs"):
        with pytest.raises(FrozenInstanceError):
            setattr(q, name, None)
    changed = replace(q, config={"peft_type": "OTHER"})
    assert (changed.config, q.config) == ({"peft_type": "OTHER"}, {"peft_type": "LORA"})
    assert (changed.mean, changed.sigma, changed.metadata) == (q.mean, q.sigma, q.metadata)
    metadata = {"ess": "10"}
    q = Posterior({"a": torch.ones(1)}, {"a": torch.ones(1)}, metadata, {}, folder=Path("x"))
    metadata["ess"] = "20"
    assert (q.metadata, q.inputs) == ({"ess": "10"}, (Path("x"),))


def test_what_is_replaced_is_neither_mistaken_for_the_old_nor_for_pruned(tiny_adapter: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter).prune(0.5)
    shifted = replace(q, mean={key: value + 1 for key, value in q.mean.items()})
    assert sum(shifted.pruned().values()) == 0
    for number, changed in enumerate((shifted, replace(Posterior.from_pretrained(tiny_adapter), mean=shifted.mean))):
        changed.save_pretrained(tmp_path / str(number))
        assert same(dict(Posterior.from_pretrained(tmp_path / str(number)).mean), dict(shifted.mean))


def test_it_shows_itself_in_one_line(tiny_adapter: Path):
    q = Posterior.from_pretrained(tiny_adapter)
    weights = sum(value.numel() for value in q.mean.values())
    line = f"<Posterior {tiny_adapter}: {weights:,} weights of 4 modules, r 4, λ 1000, τ 1, 0 pruned>"
    assert repr(q) == line
    changed = q.prune(0.25).temper(2)
    assert repr(changed) == line.replace("τ 1, 0 pruned", "τ 2, 0.25 pruned")
    odd = Posterior({}, {}, {"ess": "\n"}, {"r": ["\x1b"]}, folder=Path("a\nb"))
    assert repr(odd) == "<Posterior a\\nb: 0 weights of 0 modules, τ 1, 0 pruned>"
    assert repr(toy()).startswith("<Posterior in memory: 207 weights of 2 modules, λ 10, ")


KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "bias": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_every_adapter_that_is_written(kind: str, make_adapter: Callable, tiny_llama: Path, tmp_path: Path):
    """What PEFT holds after loading is what was written; so the logits of the mean are those of the original."""
    q = Posterior.from_pretrained(make_adapter(**KINDS[kind]))
    tokens = torch.arange(3, 19)[None]

    def logits(folder: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
        saved = load_file(folder / MEAN_FILE)
        loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
        for key, value in saved.items():
            name = key if key in loaded else f"{key}.weight"  # PEFT drops it from DoRA's magnitudes
            if name not in loaded:  # modules_to_save, by their name in the base model
                name = key.rsplit(".", 1)[0] + ".modules_to_save." + key.rsplit(".", 1)[1]
            assert torch.equal(loaded[name].to(value.dtype), value), key
        with torch.no_grad():
            return model(tokens).logits

    assert q.folder is not None
    original = logits(q.folder)
    q.temper(2).save_pretrained(tmp_path / "tempered")
    assert torch.equal(logits(tmp_path / "tempered"), original)
    q.prune(0.5).save_pretrained(tmp_path / "pruned")
    assert not torch.equal(logits(tmp_path / "pruned"), original)
    drawn = Posterior(q.sample(3), q.temper(math.inf).sigma, q.metadata, q.config)
    drawn.save_pretrained(tmp_path / "drawn")
    assert not torch.equal(logits(tmp_path / "drawn"), original)


def test_old_adapters_are_read(tiny_adapter: Path, copied: Callable, tiny_llama: Path, tmp_path: Path):
    """A configuration as PEFT 0.4 wrote it, without the fields that came later."""
    folder = copied(tiny_adapter)
    fields = ("base_model_name_or_path", "peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({name: config[name] for name in fields}))
    q = Posterior.from_pretrained(folder)
    q.prune(0.1).save_pretrained(tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "adapter_config.json").read_text())) == set(fields)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")


def test_shared_tensors_stay_equal(tmp_path: Path):
    torch.manual_seed(0)
    shared, other = torch.randn(30, 4), torch.zeros(30, 4)
    mean = {"embed": shared, "head": shared.clone(), "b1.lora_B.weight": other, "b2.lora_B.weight": other.clone()}
    sigma = {key: torch.full_like(value, 0.1) for key, value in mean.items()}
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(mean, tmp_path / MEAN_FILE)
    save_sigma(tmp_path, sigma, {})
    q = Posterior.from_pretrained(tmp_path)
    # Many ratios: where two equal scores are at the cut, one of them is not pruned without the other.
    pruned = [q.prune(i / 40, criterion) for criterion in ("snr", "magnitude", "random") for i in range(1, 40)]
    out = tmp_path.with_name(f"{tmp_path.name}-pruned")
    for changed in pruned:
        changed.save_pretrained(out, overwrite=True)
        assert Posterior.from_pretrained(out).aliases.get("head") == "embed"
        assert changed.pruned()["head"] == changed.pruned()["embed"]
    for changed in (q, *pruned):
        theta = changed.sample(5)
        assert torch.equal(theta["embed"], theta["head"])
        if changed is q:  # others may be all 0
            assert not torch.equal(theta["b1.lora_B.weight"], theta["b2.lora_B.weight"])


CRITERIA = st.sampled_from(["snr", "sigma", "magnitude", "random"])


@given(st.floats(0, 1), st.floats(0, 1), CRITERIA)
@settings(max_examples=50)
def test_pruning_twice_is_pruning_the_larger_ratio(first: float, second: float, criterion: str):
    q = toy()
    p = q.prune(first, criterion).prune(second, criterion)
    once = q.prune(max(first, second), criterion)
    assert same(dict(p.mean), dict(once.mean))
    assert same(dict(p.sigma), dict(once.sigma))
    assert p.pruned_ratio == max(first, second)
    zeros = {key: int(((p.mean[key] == 0) & (p.sigma[key] == 0)).sum()) for key in p.mean}
    assert p.pruned() == once.pruned() == zeros


@given(st.floats(1e-3, 1e3))
@settings(max_examples=50)
def test_temperature_divides_the_precision(tau: float):
    q = toy()
    for key, sigma in q.temper(tau).sigma.items():
        torch.testing.assert_close(sigma.double() ** -2, tau * q.sigma[key].double() ** -2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, -math.inf, 1e-300])
def test_temperatures_that_are_none_or_make_sigma_infinite(tau: float, tmp_path: Path):
    with pytest.raises(IVONError) as error:
        toy().temper(tau).save_pretrained(tmp_path / "out")
    assert error.value.parameter == "tau"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_draw_is_mean_plus_sigma_times_noise(dtype: torch.dtype):
    q = toy(dtype=dtype)
    zeros = {key: torch.zeros(value.shape) for key, value in q.mean.items()}
    noise = Posterior(zeros, {key: value + 1 for key, value in zeros.items()}, {}, {}).sample(7, 3)
    for key, theta in q.sample(7, 3).items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        product = q.sigma[key] * noise[key]
        assert torch.equal(theta, (q.mean[key].to(wide) + product.to(wide)).to(q.mean[key].dtype))


def test_members_depend_on_seed_and_number_alone(tiny_adapter: Path):
    q = Posterior.from_pretrained(tiny_adapter)
    assert same(q.sample(1, 2), q.sample(1, 2))
    drawn = [q.sample(seed, member) for seed in (0, 1) for member in (0, 1)]
    assert not any(same(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    reordered = Posterior(dict(reversed(dict(q.mean).items())), dict(q.sigma), {}, {})
    assert same(reordered.sample(1, 2), q.sample(1, 2))


@given(st.floats(0, 1), st.floats(0.1, 10))
@settings(max_examples=30)
def test_pruning_and_temperature_commute_with_drawing(ratio: float, tau: float):
    q = toy()
    pruned = q.prune(ratio)
    plain, of_pruned, of_tempered = q.sample(3), pruned.sample(3), q.temper(tau).sample(3)
    both = pruned.temper(tau).sample(3)
    for key in q.mean:
        off = (pruned.mean[key] == 0) & (pruned.sigma[key] == 0)
        assert torch.equal(of_pruned[key], plain[key].masked_fill(off, 0))
        assert torch.equal(both[key], of_tempered[key].masked_fill(off, 0))
        # The same noise at another temperature: it shrinks by √τ.
        torch.testing.assert_close(
            (of_tempered[key] - q.mean[key]) * math.sqrt(tau), plain[key] - q.mean[key], rtol=1e-3, atol=1e-5
        )


def test_an_adapter_opens_without_width_where_only_its_mean_is_wanted(tiny_adapter: Path, plain_adapter: Path):
    for mean_only in (False, True):
        assert same(dict(open_posterior(tiny_adapter, mean_only).sigma), load_file(tiny_adapter / SIGMA_FILE))
    q = open_posterior(plain_adapter, mean_only=True)
    assert same(dict(q.sigma), {key: torch.zeros(value.shape) for key, value in q.mean.items()})
    with pytest.raises(IVONError) as error:
        open_posterior(plain_adapter)
    assert error.value.parameter == "rows"


def test_a_pruned_adapter_keeps_the_fingerprint_of_the_unpruned(tiny_adapter: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter)
    assert "unpruned_sha256" not in q.prune(0.0).metadata
    q.prune(0.1).save_pretrained(tmp_path / "once")
    once = Posterior.from_pretrained(tmp_path / "once")
    twice = once.temper(2.0).prune(0.3)
    for pruned in (once, twice):
        assert pruned.metadata["unpruned_sha256"] == q.metadata["mean_sha256"]


def test_a_written_adapter_finds_its_base_model_from_anywhere(
    tiny_adapter: Path, copied: Callable, tiny_llama: Path, tmp_path: Path
):
    folder = copied(tiny_adapter, "work/adapter")
    (tmp_path / "work" / "base").symlink_to(tiny_llama)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "./base"}))
    q = Posterior.from_pretrained(folder)
    for target, name in (("work/beside", "./base"), ("else/where", str(tmp_path / "work" / "base"))):
        q.temper(2).save_pretrained(tmp_path / target)
        assert Posterior.from_pretrained(tmp_path / target).config == {**q.config, "base_model_name_or_path": name}
