"""Combining against exact Bayesian updating, distributions of sums and PEFT; what headers tell of a chain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.inspect.diff import distance
from axolotl_ivon.posterior.chain import CHAIN, Factor, Link, check_prior, factors, links, prior_header, shared
from axolotl_ivon.posterior.combine import same_data


def posterior(seed: int = 0, shape: tuple[int, ...] = (5, 4), **facts: str) -> Posterior:
    torch.manual_seed(seed)
    mean = {"x.lora_A.weight": torch.randn(shape), "x.lora_B.weight": torch.randn(3, shape[0])}
    sigma = {key: torch.rand(value.shape) + 0.1 for key, value in mean.items()}
    return Posterior(mean, sigma, facts, {"base_model_name_or_path": "base", "lora_alpha": 8, "r": shape[0]})


@pytest.mark.parametrize("kappa", [None, 0.25, 10.0])
def test_a_shared_prior_is_counted_once(kappa: float | None) -> None:
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
        facts = {"ess": "20", "prior": str(strength / (20 * (kappa or 1)))}
        facts |= {"prior_strength": str(kappa)} if kappa else {}
        return Posterior({"w": mean.float()}, {"w": sigma.float()}, facts, {})

    both = Posterior.combine([as_posterior(slice(0, 10)), as_posterior(slice(10, 25)), as_posterior(slice(25, 40))])
    mean, sigma = exact(x, y)
    torch.testing.assert_close(both.mean["w"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.sigma["w"].double(), sigma, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["precision", "linear"])
def test_the_pruned_share_of_a_combination_is_that_of_its_weights(method: str) -> None:
    q = Posterior.combine([posterior(seed).prune(0.2) for seed in (0, 1)], method)
    zeros = sum(int(((q.mean[key] == 0) & (q.sigma[key] == 0)).sum()) for key in q.mean)
    assert q.pruned_ratio == zeros / 35
    assert 0 < q.pruned_ratio != 0.2
    assert Posterior.combine([posterior(0), posterior(1)], method).pruned_ratio == 0


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_the_pruned_share_of_means_is_that_of_their_zeros(method: str) -> None:
    q = Posterior.combine([posterior(seed).prune(0.2).temper(math.inf) for seed in (0, 1)], method)
    zeros = sum(int((mean == 0).sum()) for mean in q.mean.values())
    assert q.pruned_ratio == zeros / q.mean.weights > 0


def test_priors_of_other_strengths_are_not_shared() -> None:
    qs = [posterior(seed, ess="100.0", prior="0.005", prior_strength=kappa) for seed, kappa in enumerate("12")]
    q = Posterior.combine(qs)
    for key in q.mean:
        total = sum(each.sigma[key].double() ** -2 for each in qs)
        torch.testing.assert_close(q.sigma[key].double(), total.rsqrt(), rtol=1e-5, atol=1e-6)


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


def product(sites: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> Posterior:
    """Return the product of Gaussian factors that are given by (precision, mean), in float64."""
    total = {key: sum(site[key][0] for site in sites) for key in sites[0]}
    mean = {key: sum(site[key][0] * site[key][1] for site in sites) / total[key] for key in sites[0]}
    return Posterior(
        {key: value.float() for key, value in mean.items()},
        {key: value.rsqrt().float() for key, value in total.items()},
        {"tau": "1.0"},
        {"base_model_name_or_path": "base", "lora_alpha": 8, "r": 5},
    )


class Chain:
    """A ← B, A ← C, B ← D: each is its likelihood, a Gaussian factor, times the power κ of its prior."""

    def __init__(self, folder: Path, **kappa: float) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x.lora_A.weight": (5, 4), "x.lora_B.weight": (3, 5)}
        self.sites = {
            name: {
                key: (
                    10 + 90 * torch.rand(shape, generator=generator).double(),
                    torch.randn(shape, generator=generator).double(),
                )
                for key, shape in shapes.items()
            }
            for name in "ABCD"
        }
        self.posteriors: dict[str, Posterior] = {}
        for name, above in {"A": "", "B": "A", "C": "A", "D": "BA"}.items():
            powers, child = {name: 1.0}, name
            for one in above:
                powers[one] = powers[child] * kappa.get(child, 1.0)
                child = one
            q, header = self.product(powers), {"tau": "1.0", "ess": "1000.0", "train_size": "100"}
            if above:
                header |= prior_header(self.posteriors[above[0]], kappa.get(name, 1.0), "100")
            Posterior(q.mean, q.sigma, header, q.config).save_pretrained(folder / name)
            self.posteriors[name] = Posterior.from_pretrained(folder / name)

    def product(self, powers: dict[str, float]) -> Posterior:
        scaled = ({key: (power * p, m) for key, (p, m) in self.sites[name].items()} for name, power in powers.items())
        return product([*scaled])

    def combined(self, names: str, weights: list[float] | None = None) -> Posterior:
        return Posterior.combine([self.posteriors[name] for name in names], weights=weights)


def assert_equal(q: Posterior, expected: Posterior) -> None:
    for key in expected.mean:
        torch.testing.assert_close(q.mean[key], expected.mean[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(q.sigma[key], expected.sigma[key], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("names", "powers"),
    [
        ("AB", "AB"),
        ("BC", "ABC"),  # A is read from where it was
        ("ABC", "ABC"),
        ("AD", "ABD"),  # over B, which is not given
        ("CD", "ABCD"),
        ("BCD", "ABCD"),
        ("DACB", "ABCD"),
    ],
)
def test_what_a_chain_shares_is_counted_once(names: str, powers: str, tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    q = chain.combined(names)
    assert_equal(q, chain.product(dict.fromkeys(powers, 1.0)))
    assert (q.metadata["train_size"], q.metadata["ess"]) == (str(100 * len(names)), f"{1000.0 * len(names)}")
    assert q.metadata["chain_train_size"] == str(100 * len(powers))
    assert ("prior_sha256" in q.metadata) == (names == "BC"), "the product of B and C goes on from A too"


def test_a_prior_is_taken_off_as_strong_as_it_was_put_on(tmp_path: Path) -> None:
    chain = Chain(tmp_path, B=0.5, C=0.2, D=0.4)
    # Given, A counts in full; else as much as where it counted most.
    assert_equal(chain.combined("AB"), chain.product({"A": 1.0, "B": 1.0}))
    assert_equal(chain.combined("BC"), chain.product({"A": 0.5, "B": 1.0, "C": 1.0}))
    assert_equal(chain.combined("AD"), chain.product({"A": 1.0, "B": 0.4, "D": 1.0}))


def test_weights_of_precisions_weigh_what_each_knows_beside_the_prior(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    q = chain.combined("BC", [1.6, 0.4])
    assert_equal(q, chain.product({"A": 1.0, "B": 1.6, "C": 0.4}))
    assert q.metadata["combined"] == "precision of 2, weights 1.6, 0.4"
    assert_equal(chain.combined("BC", [1, 0]), chain.posteriors["B"])
    a, b = posterior(0), posterior(1)  # each with a prior of its own
    q = Posterior.combine([a, b], weights=[0.25, 2.0])
    for key in a.mean:
        p = [w / each.sigma[key].double() ** 2 for w, each in zip((0.25, 2.0), (a, b), strict=True)]
        torch.testing.assert_close(q.sigma[key].double(), (p[0] + p[1]).rsqrt(), rtol=1e-5, atol=1e-6)
        expected = (p[0] * a.mean[key] + p[1] * b.mean[key]) / (p[0] + p[1])
        torch.testing.assert_close(q.mean[key].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_fixed_prior_counts_once_under_weights() -> None:
    qs = [posterior(seed, ess="100.0", prior="0.005") for seed in (0, 1)]
    q = Posterior.combine(qs, weights=[0.5, 1.5])
    for key in q.mean:
        p = [1 / each.sigma[key].double() ** 2 for each in qs]
        expected = 0.5 * (p[0] - 0.5) + 1.5 * (p[1] - 0.5) + 0.5
        torch.testing.assert_close(q.sigma[key].double(), expected.rsqrt(), rtol=1e-4, atol=1e-6)


def test_a_pruned_prior_is_still_the_prior(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    a, b = (chain.posteriors[name] for name in "AB")
    pruned, whole = Posterior.combine([a.prune(0.3), b]), chain.combined("AB")
    for key in whole.sigma:
        kept = pruned.sigma[key] > 0
        torch.testing.assert_close(pruned.sigma[key][kept], whole.sigma[key][kept])
    assert pruned.metadata["chain_train_size"] == "200"


def test_a_chain_that_is_tempered_is_that_chain_tempered(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    assert_equal(Posterior.combine([chain.posteriors[x].temper(0.5) for x in "BC"]), chain.combined("BC").temper(0.5))


def test_a_prior_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    held = [chain.posteriors[name] for name in "BC"]
    (tmp_path / "A").rename(tmp_path / "moved")
    with pytest.raises(IVONError, match=r"B and .*C continue one posterior, which is no longer at .*A; give its"):
        Posterior.combine(held)
    held.append(Posterior.from_pretrained(tmp_path / "moved"))
    assert_equal(Posterior.combine(held), chain.product(dict.fromkeys("ABC", 1.0)))


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
    halves = Posterior.combine(qs, "linear")
    for key in halves.mean:
        torch.testing.assert_close(halves.mean[key], (qs[0].mean[key] + qs[1].mean[key]) / 2)


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


@pytest.mark.parametrize("method", ["precision", "linear"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 8}, "differ in r .*method cat"),
        ({"lora_alpha": 9}, "differ in lora_alpha .*method cat"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "differ in base_model.*method cat"),
        ({"use_dora": True}, "differ in use_dora .* different things"),
        ({"init_lora_weights": "pissa"}, r"differ in init_lora_weights \(.*, pissa\), .* different things"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "differ in layer_replication .* different things"),
        ({"trainable_token_indices": [3]}, "differ in trainable_token_indices .* different things"),
    ],
)
def test_adapters_of_different_kinds(method: str, other: dict, message: str, make_adapter: Callable):
    qs = [Posterior.from_pretrained(make_adapter()), Posterior.from_pretrained(make_adapter(**other))]
    with pytest.raises(IVONError, match=message):
        Posterior.combine(qs, method)


def test_rows_of_other_tokens_are_neither_combined_nor_compared(make_adapter: Callable) -> None:
    """Their tensors have the same names and shapes."""
    qs = [Posterior.from_pretrained(make_adapter(trainable_token_indices=tokens)) for tokens in ([3, 7], [4, 9])]
    assert {k: v.shape for k, v in qs[0].mean.items()} == {k: v.shape for k, v in qs[1].mean.items()}
    with pytest.raises(IVONError, match=r"trainable_token_indices \(\[3, 7\], \[4, 9\]\)"):
        Posterior.combine(qs)
    with pytest.raises(IVONError, match="trained different tokens"):
        distance(*qs)


def test_adapters_that_another_start_left_the_base_model_for_are_told_apart(make_adapter: Callable) -> None:
    """True and "gaussian" leave it as it was; an aLoRA acts from its tokens on alone."""
    plain, gaussian = (Posterior.from_pretrained(make_adapter(init_lora_weights=x)) for x in (True, "gaussian"))
    Posterior.combine([plain, gaussian])
    there = replace(plain, config={**plain.config, "alora_invocation_tokens": [5, 6]})
    for method in ("precision", "linear", "cat"):
        with pytest.raises(IVONError, match="alora_invocation_tokens"):
            Posterior.combine([gaussian, there], method)
    replicated = replace(plain, config={**plain.config, "layer_replication": [[0, 2]]})
    check_prior(replicated, {"layer_replication": [(0, 2)]})  # as a LoraConfig may have it
    with pytest.raises(IVONError, match="differ in layer_replication"):
        Posterior.combine([gaussian, replicated], "cat")


def test_keys_that_another_version_of_peft_leaves_out_are_off(make_adapter: Callable) -> None:
    a, b = (Posterior.from_pretrained(make_adapter(seed=seed)) for seed in (0, 1))

    def without(q: Posterior) -> Posterior:
        return Posterior(q.mean, q.sigma, q.metadata, {name: value for name, value in q.config.items() if value})

    assert {"use_dora", "use_rslora", "rank_pattern"} <= a.config.keys() - without(a).config.keys()
    for method in ("precision", "linear"):
        whole = Posterior.combine([a, b], method)
        for pair in ([a, without(b)], [without(a), b]):
            assert_equal(Posterior.combine(pair, method), whole)
    assert same_data(a, without(a))


def test_cat_takes_an_initialization_that_leaves_the_base_model_as_it_was(make_adapter: Callable):
    qs = [Posterior.from_pretrained(make_adapter(seed=seed, init_lora_weights="orthogonal")) for seed in (0, 1)]
    assert Posterior.combine(qs, "cat").config["init_lora_weights"] is True  # which would refuse some ranks on loading


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "olora"}], ids=str
)
def test_cat_is_refused_where_it_is_not_exact(kind: dict, make_adapter: Callable):
    qs = [Posterior.from_pretrained(make_adapter(seed=seed, **kind)) for seed in (0, 1)]
    with pytest.raises(IVONError, match=min(kind)):
        Posterior.combine(qs, "cat")


@pytest.mark.parametrize(
    ("count", "arguments", "parameter", "message"),
    [
        (2, ("sum",), "method", "choose one of precision, linear, cat"),
        (1, (), None, "1 posterior cannot be combined"),
        (0, (), None, "0 posterior"),
        (2, ("linear", [1.0]), "weights", "do not fit 2 posteriors"),
        (2, ("linear", [1.0, math.nan]), "weights", "do not fit 2 posteriors"),
        (2, ("precision", [1.0]), "weights", "do not fit 2 posteriors"),
        (2, ("precision", [-1.0, 2.0]), "weights", "0 or more, and not all 0"),
        (2, ("precision", [0.0, 0.0]), "weights", "0 or more, and not all 0"),
    ],
)
def test_arguments_that_make_no_combination(count: int, arguments: tuple, parameter: str | None, message: str):
    with pytest.raises(IVONError, match=message) as error:
        Posterior.combine([posterior()] * count, *arguments)
    assert error.value.parameter == parameter


def test_one_base_model_and_one_temperature():
    q = posterior()

    def over(base: str) -> Posterior:
        return Posterior(q.mean, q.sigma, {}, {**q.config, "base_model_name_or_path": base})

    assert set(Posterior.combine([q, over("/models/base")]).mean) == set(q.mean), "the same under another path"
    with pytest.raises(IVONError, match=r"different base models \(base, /models/other\)"):
        Posterior.combine([q, over("/models/other")])
    with pytest.raises(IVONError, match=r"different tau \(1.0, 2.0\)"):
        Posterior.combine([q, q.temper(2)])
    cold = Posterior.combine([q.temper(4)] * 2)
    assert cold.tau == 4, "whose precisions were added up"
    key = next(iter(q.sigma))
    np.testing.assert_allclose(cold.temper(0.25).sigma.raw(key), Posterior.combine([q] * 2).sigma.raw(key), rtol=1e-6)


def test_temperatures_that_trainings_chose_say_nothing_of_the_data():
    def trained(q: Posterior, tau: float) -> Posterior:
        chosen = {"tau": repr(tau), "training_tau": repr(tau)}
        return Posterior(q.mean, q.temper(tau).sigma, q.metadata | chosen, q.config)

    a, b = posterior(0), posterior(1)
    both, natural = Posterior.combine([trained(a, 95.4), trained(b, 10.7)]), Posterior.combine([a, b])
    assert both.tau == both.training_tau == 10.7
    for key in a.mean:
        torch.testing.assert_close(both.mean[key], natural.mean[key])
        torch.testing.assert_close(both.sigma[key], natural.temper(10.7).sigma[key])
    with pytest.raises(IVONError, match=r"different tau \(190.8, 10.7\)"):
        Posterior.combine([trained(a, 95.4).temper(2), trained(b, 10.7)])


@pytest.mark.parametrize("damage", [{"lora_alpha": "x"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 2}}])
def test_a_configuration_that_makes_no_sense(damage: dict):
    q = posterior()
    broken = Posterior(q.mean, q.sigma, {}, {**q.config, **damage})
    with pytest.raises(IVONError, match="lora_alpha or alpha_pattern cannot be read"):
        dict(Posterior.combine([broken, broken], "cat").mean)


@pytest.mark.parametrize("ids", [{}, {"run_ids": "a"}], ids=["old header", "id of the run"])
@pytest.mark.parametrize(
    "twin",
    [
        lambda q: q,
        lambda q: q.prune(0.3),
        lambda q: q.prune(0.3).temper(2),
        lambda q: q.temper(3).temper(1 / 3),
        lambda q: q.prune(0.6, "magnitude"),
    ],
    ids=["copy", "pruned", "pruned and tempered", "tempered back", "pruned by magnitude"],
)
def test_two_of_one_run_are_refused(
    twin: Callable, ids: dict[str, str], make_adapter: Callable, other_adapter: Path, tmp_path: Path
) -> None:
    q = Posterior.from_pretrained(make_adapter(facts=ids))
    twin(q).save_pretrained(tmp_path / "twin")
    first, copy = q.prune(0.1), Posterior.from_pretrained(tmp_path / "twin")
    for method in ("precision", "linear", "cat"):
        with pytest.raises(IVONError, match="twin hold the same data, which would count twice: they are of one run"):
            Posterior.combine([first, Posterior.from_pretrained(other_adapter), copy], method)


def test_runs_are_told_apart_and_stay_in_a_combination(make_adapter: Callable, tmp_path: Path) -> None:
    a, b, c = (Posterior.from_pretrained(make_adapter(seed=seed, facts={"run_ids": str(seed)})) for seed in range(3))
    Posterior.combine([a, b]).save_pretrained(tmp_path / "ab")
    ab = Posterior.from_pretrained(tmp_path / "ab")
    assert Posterior.combine([ab, c]).metadata["run_ids"] == "0 1 2"
    with pytest.raises(IVONError, match="hold the same data"):
        Posterior.combine([ab, b])
    # Another fit around the same mean is of other data.
    for name, value in (("run_ids", "9"), ("fit_data_sha256", "9")):
        plain = {key: text for key, text in a.metadata.items() if key != "run_ids"} if name != "run_ids" else a.metadata
        other, one = (Posterior(a.mean, a.sigma, header, a.config) for header in ({**plain, name: value}, plain))
        assert Posterior.combine([one, other]).mean.keys() == a.mean.keys()


def header(name: str, *before: tuple[str, float]) -> dict[str, str]:
    chain = [[sha, strength, 100, f"outputs/{sha}"] for sha, strength in before]
    return {"mean_sha256": name, **({CHAIN: json.dumps(chain)} if chain else {})}


A = header("A")
B, C = header("B", ("A", 0.5)), header("C", ("A", 0.25))
D, E = header("D", ("B", 1.0), ("A", 0.5)), header("E", ("B", 0.1), ("A", 0.5))


def test_links_are_the_nearest_first() -> None:
    assert links(A) == []
    assert links(D) == [Link("B", 1.0, 100, "outputs/B"), Link("A", 0.5, 100, "outputs/A")]
    assert links({CHAIN: '[["A", 1, null, "x"]]'}) == [Link("A", 1.0, None, "x")]


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '[["A"]]', '[["A", "much", 1, "x"]]', "null", '{"a": 1}'])
def test_a_damaged_chain_is_one_line(damaged: str) -> None:
    with pytest.raises(IVONError, match=r"^prior_chain of a header cannot be read"):
        links({CHAIN: damaged})


def test_what_is_shared_is_the_last_common_link() -> None:
    assert shared([A, B]) == shared([B, A, C]) == shared([A]) == shared([D]) == shared([B, D]) == []
    assert shared([B, C]) == shared([C, D]) == ["A"]
    assert shared([D, E]) == ["B"]
    assert shared([D, E, C]) == ["B", "A"]
    assert shared([D, E, B]) == []


def test_factors_are_what_each_knows_beside_its_prior() -> None:
    assert factors([A, B], [1, 1]) == [Factor(0, 1, None, 0), Factor(1, 1, 0, 0.5)]
    assert factors([D, A], [2, 1]) == [Factor(0, 2, 1, 0.5), Factor(1, 1, None, 0)]
    # A prior that is not among them counts once, as strong as it was at most.
    assert factors([B, C, A], [0.3, 0.7]) == [Factor(0, 0.3, 2, 0.5), Factor(1, 0.7, 2, 0.25), Factor(2, 0.5, None, 0)]
    assert factors([D, E, B], [1, 1])[2] == Factor(2, 1.0, None, 0.0)
    both = factors([C, D, E, A, header("B", ("A", 0.5))], [1, 1, 1])
    assert both[3:] == [Factor(3, 0.5, None, 0), Factor(4, 1.0, 3, 0.5)]
    stronger, weaker = header("F", ("B", 0.2), ("A", 0.5)), header("G", ("A", 0.01))
    assert factors([E, stronger, weaker, B, A], [1, 1, 1])[4].weight == pytest.approx(0.2 * 0.5)
    assert factors([{}, {}], [1, 1]) == [Factor(0, 1, None, 0), Factor(1, 1, None, 0)]
