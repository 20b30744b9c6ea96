"""Gradients of every example's own loss, against a loop of autograd over the examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heard import Heard
from tiny import build_llama, build_lora, random_examples
from torch import Tensor, nn

from axolotl_ivon.models.gradients import (
    ExampleGradients,
    adapter_parameters,
    exact_negative_log_likelihood,
    example_losses,
    make_differentiable,
    negative_log_likelihood,
)
from axolotl_ivon.models.session import Loading, load_model

MakeAdapter = Callable[..., Path]


def gather(gradients: ExampleGradients[Any], examples: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    found: dict[str, dict[int, Tensor]] = {}

    def consume(name: str, first: int, some: Tensor) -> None:
        for number, one in enumerate(some, start=first):
            assert number not in found.setdefault(name, {})
            found[name][number] = one.clone()

    losses = gradients(examples, consume)
    return losses, {name: torch.stack([ones[i] for i in range(len(examples))]) for name, ones in found.items()}


def loop(model: nn.Module, parameters: dict[str, nn.Parameter], losses: Callable[[Any], Tensor]) -> Any:
    """Return what autograd gives of one example after the other, each run alone."""

    def one(example: Any) -> list[Tensor]:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return list(torch.autograd.grad(losses([example]).sum(), list(parameters.values())))

    return lambda examples: dict(zip(parameters, map(torch.stack, zip(*map(one, examples), strict=True)), strict=True))


@pytest.mark.parametrize(
    ("lora", "at_once"),
    [
        ({}, True),
        ({"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.3}, True),
        ({"use_dora": True}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"bias": "lora_only", "lora_bias": True}, True),
        ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, False),
        ({"modules_to_save": ["input_layernorm"]}, False),
    ],
    ids=str,
)
def test_they_are_those_of_a_loop(make_adapter: MakeAdapter, lora: dict[str, Any], at_once: bool) -> None:
    model = load_model(make_adapter(**lora))
    parameters = adapter_parameters(model)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    examples, losses = random_examples(), functools.partial(example_losses, model)
    heard = Heard()
    with ExampleGradients(model, parameters, losses, heard) as gradients:
        values, found = gather(gradients, examples)
        again, single = gather(gradients, examples[2:3])
        assert gradients.one_at_a_time != at_once
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(heard.notes) == (not at_once)
    expected = loop(model, parameters, losses)(examples)
    assert found.keys() == expected.keys() == parameters.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(single[name][0], value[2], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(values, torch.cat([losses([item]) for item in examples]).detach())
    torch.testing.assert_close(again[0], values[2])


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_quantized_base_is_no_matter(tmp_path: Path, load_in: str) -> None:
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=128)
    build_lora(base, tmp_path / "adapter", target_modules="all-linear")
    model = load_model(tmp_path / "adapter", Loading(load_in=load_in))
    losses = functools.partial(example_losses, model)
    examples = random_examples(3)
    make_differentiable(model)
    with torch.no_grad():
        losses(examples)  # which would pack nf4 weights
    with ExampleGradients(model, adapter_parameters(model), losses) as gradients:
        _, found = gather(gradients, examples)
        assert not gradients.one_at_a_time
    expected = loop(model, adapter_parameters(model), losses)(examples)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.05 * value.norm(), name
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert load_in in type(layer).__name__
    packed = load_model(tmp_path / "adapter", Loading(load_in=load_in))
    with torch.no_grad():
        example_losses(packed, examples)
    if any(
        getattr(getattr(m.weight, "quant_state", None), "packing_format_for_cpu", False)
        for m in packed.modules()
        if hasattr(m, "support_avx512bf16_for_cpu")
    ):  # on this machine
        with pytest.raises(RuntimeError, match="load it anew"):
            make_differentiable(packed)


def test_a_large_parameter_comes_in_parts(make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make_adapter())
    parameters = adapter_parameters(model)
    losses = functools.partial(example_losses, model)
    monkeypatch.setattr("axolotl_ivon.models.gradients._MOST", 2 * 4 * 32)
    sizes: set[int] = set()
    with ExampleGradients(model, parameters, losses) as gradients:
        gradients(random_examples(), lambda name, first, some: sizes.add(len(some)))
        _, found = gather(gradients, random_examples())
    assert sizes == {1, 2, 4}
    for name, value in loop(model, parameters, losses)(random_examples()).items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5)


class Odd(nn.Module):
    """A module that uses a weight twice, another behind the hooks' back, and one with the batch in second place."""

    def __init__(self, swapped: bool, hidden: bool) -> None:
        super().__init__()
        self.twice, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.swapped, self.hidden = swapped, hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh())
        x = F.linear(x, self.other.weight, self.other.bias) if self.hidden else self.other(x)
        x = x.tanh()
        return self.head(x.transpose(0, 1)).transpose(0, 1) if self.swapped else self.head(x)


@pytest.mark.parametrize(("swapped", "hidden"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("length", [2, 5])
def test_what_the_hooks_do_not_know_is_noticed(swapped: bool, hidden: bool, length: int) -> None:
    torch.manual_seed(0)
    model = Odd(swapped, hidden)
    examples = list(torch.randn(5, length, 4))

    def losses(some: Sequence[Tensor]) -> Tensor:
        return model(torch.stack(list(some))).square().sum((1, 2))

    parameters = dict(model.named_parameters())
    with ExampleGradients(model, parameters, losses) as gradients:
        _, found = gather(gradients, examples)
        assert gradients.one_at_a_time == (swapped or hidden)
    for name, value in loop(model, parameters, losses)(examples).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_losses_are_summed_over_the_labels(make_adapter: MakeAdapter) -> None:
    model = load_model(make_adapter())
    examples = random_examples(3)
    texts = [torch.tensor([item.ids]) for item in examples]
    expected = [
        F.cross_entropy(model(text).logits[0, item.positions], torch.tensor(item.targets), reduction="sum")
        for text, item in zip(texts, examples, strict=True)
    ]
    for loss in (negative_log_likelihood, exact_negative_log_likelihood):
        torch.testing.assert_close(example_losses(model, examples, loss), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_tiny_losses_keep_their_digits() -> None:
    logits = torch.tensor([[18.0, 0.3, -1.0], [0.5, -3.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 2])
    losses = exact_negative_log_likelihood(logits, targets)
    losses.sum().backward()
    exact = logits.detach().double().requires_grad_(True)
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=0)  # type: ignore[union-attr]


def test_an_error_leaves_the_model_as_it_was(make_adapter: MakeAdapter) -> None:
    model = load_model(make_adapter())
    parameters = adapter_parameters(model)

    def consume(name: str, first: int, some: Tensor) -> None:
        raise KeyError(name)

    with (
        pytest.raises(KeyError),
        ExampleGradients(model, parameters, functools.partial(example_losses, model)) as gradients,
    ):
        gradients(random_examples(), consume)
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not any(module._forward_hooks for module in model.modules())
