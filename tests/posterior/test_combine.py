"""Combining is held against exact Bayesian updating, against distributions of sums, and against PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONError, Posterior


def posterior(seed: int = 0, shape: tuple[int, ...] = (5, 4), **facts: str) -> Posterior:
    torch.manual_seed(seed)
    mean = {"x.lora_A.weight": torch.randn(shape), "x.lora_B.weight": torch.randn(3, shape[0])}
    sigma = {key: torch.rand(value.shape) + 0.1 for key, value in mean.items()}
    return Posterior(mean, sigma, facts, {"base_model_name_or_path": "base", "lora_alpha": 8, "r": shape[0]})


# --- precision --------------------------------------------------------------------------------------------------


def test_a_posterior_with_itself_has_half_the_variance():
    q = posterior(ess="100.0", train_size="50", prior="empirical")
    both = Posterior.combine([q, q])
    for key in q.mean:
        torch.testing.assert_close(both.mean[key], q.mean[key])
        torch.testing.assert_close(both.sigma[key] ** 2, q.sigma[key] ** 2 / 2)
    assert both.metadata["ess"] == "200.0"
    assert both.metadata["train_size"] == "100"


def test_precision_is_the_product_of_the_densities():
    qs = [posterior(seed) for seed in range(3)]
    both = Posterior.combine(qs)
    key = "x.lora_A.weight"

    def log_density(x: torch.Tensor) -> torch.Tensor:
        normals = [torch.distributions.Normal(q.mean[key].double(), q.sigma[key].double()) for q in qs]
        return sum(normal.log_prob(x) for normal in normals)

    # The combined density differs from the product by a constant: their log-ratio is the same everywhere.
    combined = torch.distributions.Normal(both.mean[key].double(), both.sigma[key].double())
    points = [qs[0].mean[key].double() + shift for shift in (-1.0, 0.0, 0.5)]
    ratios = [combined.log_prob(x) - log_density(x) for x in points]
    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ratios[0], ratios[2], rtol=1e-4, atol=1e-4)


def test_a_shared_prior_is_counted_once():
    """y = w·x + noise: the posteriors of two halves of the data combine into that of all of it, to rounding."""
    torch.manual_seed(0)
    x, noise = torch.randn(40, 6, dtype=torch.double), torch.randn(40, 6, dtype=torch.double)
    y = 0.7 * x + noise
    strength = 2.0  # the prior's precision, ess · δ

    def exact(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        precision = strength + (x**2).sum(0)
        return (x * y).sum(0) / precision, precision**-0.5

    def as_posterior(part: slice) -> Posterior:
        mean, sigma = exact(x[part], y[part])
        facts = {"ess": "20", "prior": str(strength / 20)}
        return Posterior({"w": mean.float()}, {"w": sigma.float()}, facts, {})

    both = Posterior.combine([as_posterior(slice(0, 10)), as_posterior(slice(10, 25)), as_posterior(slice(25, 40))])
    mean, sigma = exact(x, y)
    torch.testing.assert_close(both.mean["w"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.sigma["w"].double(), sigma, rtol=1e-5, atol=1e-6)


def test_a_prior_never_takes_knowledge_away():
    q = posterior(ess="1e6", prior="1.0")  # a prior that claims more than either posterior knows
    both = Posterior.combine([q, q])
    for key in q.mean:
        torch.testing.assert_close(both.sigma[key], q.sigma[key])


def test_where_sigma_is_zero_that_mean_stands():
    a, b = posterior(0), posterior(1)
    pruned = a.prune(0.5)
    both = Posterior.combine([pruned, b])
    for key in a.mean:
        off = pruned.sigma[key] == 0
        assert torch.equal(both.mean[key] == 0, off)
        assert torch.equal(both.sigma[key] == 0, off)
    assert Posterior.combine([pruned, pruned]).pruned() == pruned.pruned()
    with pytest.raises(IVONError, match=r"two posteriors at different means of x\.lora_A\.weight"):
        dict(Posterior.combine([a.temper(math.inf), b.temper(math.inf)]).mean)


# --- linear -----------------------------------------------------------------------------------------------------


def test_linear_is_the_distribution_of_the_weighted_sum():
    qs, weights = [posterior(0), posterior(1)], [0.3, -0.7]
    both = Posterior.combine(qs, "linear", weights)
    count = 4000
    draws = [
        sum(w * q.sample(seed, i)["x.lora_A.weight"] for seed, (w, q) in enumerate(zip(weights, qs, strict=True)))
        for i in range(count)
    ]
    drawn = torch.stack(draws).double()
    sigma = both.sigma["x.lora_A.weight"].double()
    assert ((drawn.mean(0) - both.mean["x.lora_A.weight"]) / sigma).abs().max() < 5 / math.sqrt(count)
    assert (drawn.var(0) / sigma**2 - 1).abs().max() < 5 * math.sqrt(2 / count)


def test_linear_weights_are_equal_by_default():
    a, b = posterior(0), posterior(1)
    both = Posterior.combine([a, b], "linear")
    for key in a.mean:
        torch.testing.assert_close(both.mean[key], (a.mean[key] + b.mean[key]) / 2)


# --- cat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        [{"seed": 1}],
        [{"seed": 1, "r": 7, "lora_alpha": 3, "use_rslora": True}],
        [{"seed": 1, "target_modules": ["v_proj", "o_proj"]}, {"seed": 2, "target_modules": ["k_proj"]}],
        [{"seed": 1, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}],
    ],
)
def test_cat_is_the_weighted_sum_of_the_updates(
    others: list[dict], make_adapter: Callable, tiny_llama: Path, tmp_path: Path
):
    folders = [make_adapter(), *(make_adapter(**other) for other in others)]
    weights = [0.4, -0.3, 0.9][: len(folders)]
    Posterior.combine([Posterior.from_pretrained(f) for f in folders], "cat", weights).save_pretrained(tmp_path / "cat")

    def base() -> AutoModelForCausalLM:
        return AutoModelForCausalLM.from_pretrained(tiny_llama)

    start = base().state_dict()

    def update(folder: Path) -> dict[str, torch.Tensor]:
        merged = PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()
        return {key: merged[key] - start[key] for key in start}

    expected = [update(folder) for folder in folders]
    for key, delta in update(tmp_path / "cat").items():
        total = sum(w * each[key] for w, each in zip(weights, expected, strict=True))
        torch.testing.assert_close(delta, total, rtol=1e-4, atol=1e-6, msg=key)


def test_cat_scales_sigma_as_it_scales_the_mean():
    a, b = posterior(0, (2, 4)), posterior(1, (3, 4))
    both = Posterior.combine([a, b], "cat", [0.5, -2.0])
    # alpha 8 over r 2 and over r 3
    for index, (q, factor) in enumerate(((a, 0.5 * 4), (b, -2 * 8 / 3))):
        rows = slice(0, 2) if index == 0 else slice(2, 5)
        torch.testing.assert_close(both.mean["x.lora_A.weight"][rows], factor * q.mean["x.lora_A.weight"])
        torch.testing.assert_close(both.sigma["x.lora_A.weight"][rows], abs(factor) * q.sigma["x.lora_A.weight"])
        assert torch.equal(both.sigma["x.lora_B.weight"][:, rows], q.sigma["x.lora_B.weight"])


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["precision", "linear"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 8}, "differ in r"),
        ({"lora_alpha": 9}, "differ in lora_alpha"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "differ in base_model"),
        ({"use_dora": True}, "differ in use_dora"),
    ],
)
def test_adapters_of_different_kinds(method: str, other: dict, message: str, make_adapter: Callable):
    qs = [Posterior.from_pretrained(make_adapter()), Posterior.from_pretrained(make_adapter(**other))]
    with pytest.raises(IVONError, match=f"{message}.*method cat"):
        Posterior.combine(qs, method)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_cat_is_refused_where_it_is_not_exact(kind: dict, name: str, make_adapter: Callable):
    qs = [Posterior.from_pretrained(make_adapter(**kind))] * 2
    with pytest.raises(IVONError, match=name):
        Posterior.combine(qs, "cat")


def test_mistakes():
    q = posterior()
    other = Posterior(q.mean, q.sigma, {}, {**q.config, "base_model_name_or_path": "/models/other"})
    for arguments, message in (
        (([q, q], "sum"), "method 'sum' is unknown; choose one of precision, linear, cat"),
        (([q],), "1 posterior cannot be combined"),
        (([],), "0 posterior"),
        (([q, q], "linear", [1.0]), "do not fit 2 posteriors"),
        (([q, q], "linear", [1.0, math.nan]), "do not fit 2 posteriors"),
        (([q, q], "precision", [1.0, 1.0]), "for the methods linear and cat"),
        (([q, other],), r"different base models \(base, /models/other\)"),
        (([q, q.temper(2)],), r"different tau \(1.0, 2.0\)"),
    ):
        with pytest.raises(IVONError, match=message):
            Posterior.combine(*arguments)


def test_the_same_base_model_under_another_path_is_the_same():
    q = posterior()
    moved = Posterior(q.mean, q.sigma, {}, {**q.config, "base_model_name_or_path": "/models/base"})
    assert set(Posterior.combine([q, moved]).mean) == set(q.mean)


def test_no_input_can_be_overwritten(make_adapter: Callable, copied: Callable):
    folders = [copied(make_adapter(seed=seed), f"{seed}") for seed in (0, 1)]
    both = Posterior.combine([Posterior.from_pretrained(folder) for folder in folders])
    for folder in folders:
        with pytest.raises(IVONError, match="never modified"):
            both.save_pretrained(folder, overwrite=True)


@pytest.mark.parametrize("damage", [{"lora_alpha": "x"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 2}}])
def test_a_configuration_that_makes_no_sense(damage: dict):
    q = posterior()
    broken = Posterior(q.mean, q.sigma, {}, {**q.config, **damage})
    with pytest.raises(IVONError, match="lora_alpha or alpha_pattern cannot be read"):
        dict(Posterior.combine([broken, broken], "cat").mean)


def test_the_same_posterior_twice_is_refused(tiny_adapter: Path, copied: Callable):
    q = Posterior.from_pretrained(tiny_adapter)
    for twin in (q, Posterior.from_pretrained(copied(tiny_adapter))):
        for method in ("precision", "linear", "cat"):
            with pytest.raises(IVONError, match="hold the same posterior, whose data would count twice"):
                Posterior.combine([q, twin], method)
    # Another σ at the same mean is another posterior: of other data, say.
    wider = q.temper(0.5)
    wider.metadata["tau"] = "1.0"
    assert Posterior.combine([q, wider]).mean.keys() == q.mean.keys()
