"""The table of settings, what follows from it, and the presets against closed forms."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONLoRA, attach, effective_sample_size
from axolotl_ivon.errors import IVONError
from axolotl_ivon.optim.kernels.base import ESS_CEILING
from axolotl_ivon.settings.keys import DEFAULTS, IVONArgs, attach_parameters
from axolotl_ivon.settings.presets import PRESETS, passes, resolved, usual_rate
from axolotl_ivon.settings.table import PAPER, SETTINGS, settings_header


def test_every_signature_has_the_parameters_and_defaults_of_the_table() -> None:
    assert [PAPER[name] for name in ("gamma", "h0", "clip", "beta1", "beta2")] == [5000.0, 5e-2, 5e-3, 0.9, 0.9995]
    assert [PAPER[name] for name in ("prior", "prior_strength", "hessian")] == ["empirical", 1.0, "reparameterized"]
    unset = {s.name: s.auto if s.auto == s.paper else None for s in SETTINGS}  # None: the preset's
    unset["betas"] = unset.pop("beta1"), unset.pop("beta2")
    defaults = {name: parameter.default for name, parameter in inspect.signature(attach).parameters.items()}
    assert {name: defaults.pop(name) for name in unset} == unset
    assert defaults == {"trainer": inspect.Parameter.empty, "train_size": None}
    paper = {**PAPER, "betas": (PAPER["beta1"], PAPER["beta2"]), "lr": 1e-2, "seed": 0, "batch_size": 1}
    paper |= {"tau": 1.0}
    for name, parameter in inspect.signature(IVONLoRA).parameters.items():
        if name not in ("params", "ess"):
            assert parameter.default == paper[name], name
    assert effective_sample_size(4) == 2 * PAPER["gamma"]


def test_the_keys_are_those_of_the_table_name_their_defaults_and_become_parameters_of_attach() -> None:
    properties = IVONArgs.model_json_schema()["properties"]
    assert list(properties) == [s.key for s in SETTINGS]
    for setting in SETTINGS:
        assert f"{setting.help}. Default: {setting.default}." in properties[setting.key]["description"]
    assert all(f"Default: {default}." in str(properties) for default in ("`auto`", "unset; 5000 by `paper`", "false"))
    assert DEFAULTS.keys() < properties.keys()
    assert attach_parameters({}) == {"betas": (0.9, None)}
    given = {"ivon_lambda": 3.0, "ivon_beta1": 0.5, "ivon_beta2": 0.7, "ivon_clip": None, "learning_rate": 1.0}
    assert attach_parameters(given) == {"ess": 3.0, "betas": (0.5, 0.7)}


def test_values_that_are_given_take_the_place_of_a_preset_s() -> None:
    assert resolved("auto", dict.fromkeys(PAPER)) == PRESETS["auto"]
    mine = resolved("auto", {"ess": 7.0, "h0": 0.3, "beta2": 0.5, "prior_strength": 2.0, "draws": "shared"})
    run = mine.for_run(0, {"x.lora_A.y": (4, 8)}, 2e-4, 100, 3.0)
    assert run == {"ess": 7.0, "h0": 0.3, "betas": (0.9, 0.5), "direction": "adam", "tau": 1.0}
    assert mine.prior_strength == mine.posterior_strength == 2.0


def test_by_adam_s_direction_draws_are_as_wide_for_how_far_weights_get_as_in_a_run_of_the_preset_s_travel() -> None:
    shapes = {"x.lora_A.y": (16, 576), "x.lora_B.y": (576, 16)}
    signs, adam = (resolved("auto", {"direction": direction}) for direction in ("newton", "adam"))
    usual = signs.for_run(512, shapes, 2e-4, 128, 2.0)
    short, long = (adam.for_run(512, shapes, 2e-4, steps, 2.0) for steps in (128, 6250))
    reach = 2e-4 * 128 / 2 / 5  # in few passes, where there is nothing to gain from noise
    assert {name: short[name] for name in ("ess", "h0")} == {name: usual[name] for name in ("ess", "h0")}
    assert short["tau"] ** -0.5 == pytest.approx(reach / 0.125)  # σ, at the start and at any h
    assert long["tau"] == adam.for_run(512, shapes, 2.5e-4, 1000, 8.0)["tau"] == usual["tau"] == 1
    # A run that hardly moves, over the weights and data of the largest models, is within what the optimizer takes.
    large = adam.for_run(10**6, {"x.lora_A.y": (64, 2 * 10**6)}, 1e-6, 1, 1.0)
    assert 1e13 < large["ess"] * large["tau"] <= ESS_CEILING
    by_hand = resolved("auto", {"direction": "adam", "ess": 7.0}).for_run(512, shapes, 2e-4, 128, 2.0)
    assert (by_hand["ess"], by_hand["tau"]) == (7, 1)
    assert adam.for_run(512, shapes, 2e-4, 128, 5.1)["tau"] == pytest.approx(short["tau"] / 25)


@pytest.mark.parametrize(
    ("changes", "prior", "rescale", "named"),
    [
        ({"hessian": "reparameterized"}, "empirical", False, "hessian squared_gradients alone, not reparameterized"),
        ({}, 0.1, False, "prior empirical alone, not 0.1"),
        ({}, "earlier/", False, "prior empirical alone, not earlier/"),
        ({}, "empirical", True, "rescale_lr false alone, not True"),
    ],
)
def test_adam_s_direction_needs_what_it_is_made_of(changes: Any, prior: Any, rescale: bool, named: str) -> None:
    assert resolved("auto", changes).with_direction(prior, rescale).direction == "newton"
    assert resolved("auto", {}).with_direction("empirical", online=True).direction == "newton"
    with pytest.raises(IVONError, match=named):
        resolved("auto", {**changes, "direction": "adam"}).with_direction(prior, rescale)


@pytest.mark.parametrize(
    ("preset", "changes", "rate", "epochs", "expected"),
    [
        ("auto", {}, 2e-4, 5.0, "adam"),
        ("auto", {}, 2e-4, 0.0, "adam"),  # a stream
        ("auto", {}, 1e-3, 50.0, "adam"),
        ("auto", {"direction": "newton"}, 2e-4, 2.0, "newton"),
        ("auto", {"direction": "adam"}, 2e-4, 50.0, "adam"),
        ("paper", {}, 2e-4, 2.0, "newton"),
    ],
)
def test_the_step_is_adamw_s_in_runs_of_any_length(
    preset: str, changes: Any, rate: float, epochs: float, expected: str
) -> None:
    chosen = resolved(preset, changes).with_direction("empirical")
    assert chosen.for_run(512, {"x.lora_A.y": (16, 576)}, rate, 128, epochs)["direction"] == expected


@pytest.mark.parametrize(
    ("kind", "width", "rate"),
    [
        ("llama", 576, 5.0e-4),  # SmolLM2-135M
        ("qwen2", 896, 2.0e-4),  # Qwen2.5-Coder-0.5B
        ("llama", 4096, 1.1e-4),
        ("qwen3_moe", 4096, 1.8e-4),
        ("mistral", 4096, 1.1e-4),  # of another kind: the lower of both
        ("gpt2", 768, 2.0e-4),
        ("llama", 512, 5.5e-4),
        ("llama", 16, 5.5e-4),  # narrower than any that is trained for use
    ],
)
def test_the_usual_rate_is_lower_the_wider_a_model_is(kind: str, width: int, rate: float) -> None:
    """LoRA Without Regret has 5e-4·(2000/width)^power, with 0.781 for Llama and 0.0775 for Qwen: this is 0.38 of it."""
    config = SimpleNamespace(model_type=kind, hidden_size=width)
    assert usual_rate(config, 20.0) == usual_rate(config, 31.0) == usual_rate(config, 0.0) == rate
    assert usual_rate(config, 124.0) == pytest.approx(rate / 2, rel=0.05)  # four times as many
    assert usual_rate(config, 10.0) == usual_rate(config, 0.1) == pytest.approx(2 * rate, rel=0.05)
    assert usual_rate(config, 15.0) == pytest.approx(2**0.5 * rate, rel=0.05)
    published = {power: 5e-4 * (2000 / max(width, 512)) ** power for power in (0.781, 0.0775)}
    own = {"llama": [0.781], "qwen2": [0.0775], "qwen3_moe": [0.0775]}.get(kind, list(published))
    assert rate == pytest.approx(0.38 * min(published[power] for power in own), rel=0.03)


@given(size=st.integers(1, 5000), batch=st.integers(1, 64), epochs=st.integers(1, 40))
def test_whole_epochs_are_as_many_passes_however_small_the_last_batch(size: int, batch: int, epochs: int) -> None:
    loader = math.ceil(size / batch)
    assert passes(epochs * loader, size, batch) == epochs  # as a Trainer counts
    assert passes(math.ceil(epochs * size / batch), size, batch) <= epochs  # and no more as axolotl does


def test_the_width_is_that_of_the_text_model_and_may_be_unknown() -> None:
    seeing = transformers.Qwen2_5_VLConfig(text_config={"hidden_size": 3584, "model_type": "qwen2_5_vl_text"})
    assert usual_rate(seeing, 20.0) == usual_rate(SimpleNamespace(model_type="qwen2", hidden_size=3584), 20.0)
    wrong = [SimpleNamespace(hidden_size=size) for size in (None, [64], "64")]
    for unknown in (None, object(), {"hidden_size": 64}, *wrong):
        assert usual_rate(unknown, 20.0) == 1.9e-4
    assert usual_rate(transformers.GPT2Config(n_embd=1024), 20.0) == 2.0e-4


@pytest.mark.parametrize(
    ("preset", "changes", "usual"),
    [
        ("auto", {}, True),
        ("auto", {"direction": "newton"}, False),
        ("auto", {"hessian": "reparameterized"}, False),
        ("paper", {}, False),
        ("paper", {"direction": "adam", "hessian": "squared_gradients"}, False),
    ],
)
def test_a_run_without_a_rate_has_the_usual_one_by_adam_s_direction(preset: str, changes: Any, usual: bool) -> None:
    assert resolved(preset, changes).with_direction("empirical").has_usual_rate is usual


def test_the_header_has_later_settings_where_they_are_not_the_paper_s() -> None:
    assert "hessian" not in settings_header(PAPER)
    header = settings_header({**PAPER, "hessian": "squared_gradients", "rescale_lr": True, "h0_steps": 10.0})
    assert header.items() >= {"h0": "0.05", "hessian": "squared_gradients", "rescale_lr": "true"}.items()
    assert header["h0_steps"] == "10.0"
    assert header.keys().isdisjoint({"prior_strength", "eval_samples", "draws"})


def test_settings_need_no_torch() -> None:
    code = "import axolotl_ivon.settings.keys, axolotl_ivon.settings.presets, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lambda_h0_and_memory_are_the_paper_s_or_by_rules() -> None:
    paper, auto = PRESETS["paper"], PRESETS["auto"]
    assert effective_sample_size(10_000) == pytest.approx(500_000)
    assert effective_sample_size(4, gamma=1.0) == pytest.approx(2.0)
    for bad in ({"n": 0}, {"n": 5, "gamma": 0.0}, {"n": 5, "gamma": float("inf")}):
        with pytest.raises(ValueError, match="positive"):
            effective_sample_size(**bad)
    assert 1 / (1 - auto.second_beta(5000)) == pytest.approx(1000)
    assert 1 / (1 - auto.second_beta(5000, "adam")) == pytest.approx(5000)
    assert auto.second_beta(1) == auto.second_beta(50) == 0.9
    assert paper.second_beta(7) == 0.9995
    assert paper.ess(900, 10**6) == effective_sample_size(900, 5000.0)
    assert paper.first_h0(1e5, [4096] * 1000) == 0.05
    assert auto.ess(256, 92_160) == 256_000
    assert auto.ess(10, 896) == 250_000
    # All of p from the data: σ² = 1/(λ·h), so Σ ½·h·σ² of an example, times their number, is 50 nats.
    ess = auto.ess(900, 460_800)
    h = torch.rand(460_800, dtype=torch.float64)
    assert 900 * float((h / (ess * h)).sum()) / 2 == pytest.approx(50)
    # 60 matrices of 576 inputs: each has variance 1/1728, and 60·1728·σ² is to be 64 at the start.
    assert 60 * 1728 / (ess * auto.first_h0(ess, [576] * 60)) == pytest.approx(64)
    assert 2 * 1728 / (ess * auto.first_h0(ess, [576] * 2)) == pytest.approx(2 * 4)
    with pytest.raises(ValueError, match="training examples"):
        auto.ess(0, 5)


@pytest.mark.parametrize(
    ("matrices", "epochs", "share"),
    [
        (12, 31, 1),  # q and v of six layers
        (12, 62, 0.5**0.5),
        (42, 10, 2),
        (42, 20, (12 / 42) ** 0.5),  # all seven matrices of six layers
        (42, 15, 2**0.5 * (12 / 42) ** 0.25),
        (210, 20, 0.25),  # … of thirty
        (10**6, 62, 0.25 * 0.5**0.5),
        (0, 31, 1),  # not known
    ],
)
def test_in_many_epochs_the_usual_rate_is_lower_for_many_matrices(matrices: int, epochs: float, share: float) -> None:
    config = transformers.LlamaConfig(hidden_size=576)
    assert usual_rate(config, epochs, matrices) == pytest.approx(share * 5e-4, rel=0.05)


@given(st.integers(1, 10**6), st.integers(1, 10**9), st.floats(0, 1000), st.floats(0, 1000))
def test_few_examples_and_weights_count_as_more_in_a_short_run(
    size: int, weights: int, epochs: float, more: float
) -> None:
    auto = PRESETS["auto"]
    assert auto.ess(128, 896, 62) == 128_000
    assert auto.ess(10, 896, 62) == auto.ess(10, 896, 20) == 125_000
    assert auto.ess(10, 896, 15) == 187_500
    ess = auto.ess(size, weights, epochs)
    assert ess >= auto.ess(size, weights, epochs + more) * (1 - 1e-12)
    assert ess >= 1000 * size
    if epochs <= 10 or (size >= 250 and weights <= 100_000):
        assert ess == auto.ess(size, weights)
    if epochs >= 20:  # a large adapter learns its data by heart among draws that grow narrower in proportion
        assert ess == pytest.approx(auto.ess(size, 1, epochs) * max(1, weights / 100_000) ** 0.5)
        signs = auto._replace(direction="newton")
        assert signs.ess(size, weights, epochs) == pytest.approx(ess * max(1, weights / 100_000) ** 0.5)
    assert PRESETS["paper"].ess(size, weights, epochs) == PRESETS["paper"].ess(size, weights)
