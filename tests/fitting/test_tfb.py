"""Training-free Bayesianization against the paper's own construction, by singular value decomposition."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from axolotl_ivon.fitting.tfb import FARTHEST, _rows_of_a, first_width, noise_shape, widest
from axolotl_ivon.models.gradients import adapter_parameters
from axolotl_ivon.models.session import load_model

MakeAdapter = Callable[..., Path]


def paper_covariance(b: Tensor) -> Tensor:
    """The covariance of a column of noise on A at σ_q = 1: the paper's, on VᵀA, turned back to the rows of A."""
    _, d, vt = torch.linalg.svd(b.double(), full_matrices=False)
    omega = 1 / d
    return vt.T @ torch.diag(omega.square()) @ vt


def random_b(seed: int, rank: int = 4, outputs: int = 9) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, rank)[torch.randperm(rank, generator=draw)]
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=draw))[0]
    return torch.randn(outputs, rank, generator=draw) @ rotation * scales


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_with_orthogonal_columns_it_is_the_paper_s_noise(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(9, 4, generator=draw, dtype=torch.float64))
    b = q * torch.tensor([3.0, 0.2, 1.0, 0.5])
    covariance = paper_covariance(b)
    torch.testing.assert_close(torch.diag(_rows_of_a(b, 1).double().square()), covariance, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_else_it_is_the_nearest_independent_noise_and_moves_the_product_as_far(seed: int) -> None:
    b = random_b(seed).double()
    covariance, rank = paper_covariance(b), b.shape[1]
    ours = _rows_of_a(b, 1).double().square()

    def divergence(variances: Tensor) -> float:
        """KL(independent noise ‖ the paper's) for one column."""
        precision = torch.linalg.inv(covariance)
        return float(0.5 * ((precision.diagonal() * variances).sum() - variances.log().sum()))

    best = divergence(ours)
    draw = torch.Generator().manual_seed(seed)
    for size in (0.01, 0.1, 1.0):
        assert divergence(ours * (size * torch.randn(rank, generator=draw, dtype=torch.float64)).exp()) >= best
    # E|B·noise|²: the paper's is 1 for each of rank directions.
    assert float(torch.trace(b @ covariance @ b.T)) == pytest.approx(rank, rel=1e-6)
    assert float(torch.trace(b @ torch.diag(ours) @ b.T)) == pytest.approx(rank, rel=1e-5)
    # Given the other rows, the paper's noise of a row has that variance; alone it has more.
    torch.testing.assert_close(ours, 1 / torch.linalg.inv(covariance).diagonal(), rtol=1e-4, atol=0)
    assert (covariance.diagonal() >= ours * (1 - 1e-5)).all()


def test_the_layers_of_an_adapter(make_adapter: MakeAdapter) -> None:
    model = load_model(make_adapter(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    parameters = adapter_parameters(model)
    shape = noise_shape(model, parameters)
    a_names = {name for name in parameters if "lora_A" in name or "lora_embedding_A" in name}
    assert shape.keys() == a_names
    for name, values in shape.items():
        b = parameters[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].detach()
        assert values.shape == parameters[name].shape
        torch.testing.assert_close(values[:, 0], 1 / b.norm(dim=0))
        assert (values == values[:, :1]).all()


def test_experts_have_their_own_columns() -> None:
    """Against PEFT's own product: noise on one row of A of one expert moves that expert by ‖its column of B‖."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 5, 7))  # experts, inputs, outputs

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ti,eio->teo", x, self.weight)

    torch.manual_seed(0)
    model: Any = nn.Sequential(OrderedDict(experts=Experts()))
    model = get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.weight"], init_lora_weights=False))
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    shape = noise_shape(model, parameters)
    [(name, values)] = shape.items()
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    a = parameters[name]
    with torch.no_grad():
        before = layer.get_delta_weight("default").clone()
        for row in range(len(a)):
            a[row, 0] += 1
            moved = (layer.get_delta_weight("default") - before).norm() / layer.scaling["default"]
            a[row, 0] -= 1
            assert float(moved * values[row, 0]) == pytest.approx(1, rel=1e-4)


def test_a_column_of_zeros_gives_no_noise() -> None:
    b = torch.tensor([[1.0, 0.0, 1e-9], [0.0, 0.0, 0.0]])
    assert _rows_of_a(b, 1).tolist() == [1.0, 0.0, 0.0]
    assert first_width({"a": torch.zeros(2, 3)}, {"a": torch.ones(2, 3)}) == 0


@pytest.mark.parametrize("root", [1e-4, 0.03, 0.5, 1.0, 7.0, 60.0])
def test_the_widest_within_the_cost_is_found_in_few_evaluations(root: float) -> None:
    calls = []

    def cost(width: float) -> float:
        calls.append(width)
        return math.log(width / root)

    found, tried = widest(cost, 1.0, 11)
    assert len(calls) == len(tried) <= 11
    assert len(set(calls)) == len(calls)
    assert root / 1.6 <= found <= root
    if 0.02 < root < 50:
        assert root / 1.05 <= found


def test_where_every_width_costs_too_much_or_too_little() -> None:
    assert widest(lambda width: 1.0, 1.0, 5)[0] == 0
    found, tried = widest(lambda width: -1.0, 0.5, 11)
    assert found == FARTHEST / 2
    assert len(tried) == 4
