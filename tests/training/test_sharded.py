"""The replicated adapter by itself: what leaves the model, what comes back, and its file in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import make_trainer

from axolotl_ivon import IVONError, IVONLoRA
from axolotl_ivon.training.callback import trained_parameters
from axolotl_ivon.training.sharded import ANCHOR, STATE_FILE, ReplicatedAdapter


def replicated(base: Path, output: Path, seed: int = 0) -> ReplicatedAdapter:
    """An adapter taken out of its model, with an optimizer that has made a step."""
    trainer = make_trainer(base, output)
    adapter = ReplicatedAdapter(trainer, trainer.model, trained_parameters(trainer.model))
    optimizer = IVONLoRA(list(adapter.params.items()), ess=1e4, clip=0.1, seed=seed)
    trainer.optimizer = adapter.anchor_optimizer(optimizer)
    with optimizer.sampled_params():
        for param in adapter.params.values():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    adapter.on_pre_optimizer_step(None, None, None)
    adapter.on_optimizer_step(None, None, None)
    return adapter


def test_the_engine_sees_an_anchor_and_no_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path)
    model, inputs = trainer.model.eval(), torch.arange(3, 9)[None]
    before, logits = trained_parameters(model), model(inputs).logits
    adapter = ReplicatedAdapter(trainer, model, before)
    assert list(trained_parameters(model)) == [ANCHOR]
    assert list(adapter.params) == list(before)
    assert all(torch.equal(adapter.params[name], param) for name, param in before.items())
    assert torch.equal(model(inputs).logits, logits), "the forward pass reads the replica"
    adapter.on_train_end(None, None, None)
    after = trained_parameters(model)
    assert set(after) == {*before, ANCHOR}
    assert all(after[name] is param for name, param in adapter.params.items())


def test_where_the_anchor_steps_the_adapter_does(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = replicated(tiny_llama, tmp_path)
    start = trained_parameters(make_trainer(tiny_llama, tmp_path).model)
    sizes = sum(param.numel() for param in start.values())
    assert float(adapter.gradient_norm) == pytest.approx(sizes**0.5, rel=0.2)  # of standard normals
    assert all(not torch.equal(param, start[name]) for name, param in adapter.params.items())
    assert all(param.grad is None for param in adapter.params.values())
    completed = adapter.add_mean({"other": torch.ones(1)})
    assert set(completed) == {"other", *adapter.params}
    assert all(torch.equal(completed[name], param) for name, param in adapter.params.items())


def test_the_state_comes_back_from_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    one, other = (replicated(tiny_llama, tmp_path, seed) for seed in (0, 1))
    path = tmp_path / STATE_FILE
    one.save_state(path)
    first = next(iter(one.params))
    assert {key for key in load_file(path) if key.startswith(first)} == {
        f"{first}/{name}" for name in one.optimizer.state[one.params[first]]
    }
    other.load_state(path)
    for name, param in one.params.items():
        assert torch.equal(param, other.params[name])
        assert torch.equal(one.optimizer.sigma(param), other.optimizer.sigma(other.params[name]))
    assert other.optimizer.param_groups[0]["draws"] == one.optimizer.param_groups[0]["draws"] == 1


def test_a_state_that_is_not_this_adapter_s_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = replicated(tiny_llama, tmp_path)
    path = tmp_path / STATE_FILE

    def refused(words: str) -> None:
        with pytest.raises(IVONError, match=words) as caught:
            adapter.load_state(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    refused("missing or damaged")
    path.write_bytes(b"{}")
    refused("missing or damaged")
    adapter.save_state(path)
    tensors: dict[str, Any] = load_file(path)
    facts = {"format": "ivon-state", "format_version": "1", "draws": "1"}
    save_file(tensors, path, metadata={**facts, "format_version": "2"})
    refused("has format ivon-state 2")
    first = next(iter(adapter.params))
    save_file({key: t for key, t in tensors.items() if not key.startswith(f"{first}/")}, path, metadata=facts)
    refused("no state of")
    save_file({key: t.reshape(-1)[:1].clone() for key, t in tensors.items()}, path, metadata=facts)
    refused("does not fit the adapter")
