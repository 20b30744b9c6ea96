"""IVONLoRA against independent oracles: the float64 reference, ivon-opt, closed forms."""

from __future__ import annotations

import copy
import gc
import io
import math
from functools import partial

import ivon
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceIVON
from torch import nn
from toy import (
    ADAM,
    SETTINGS,
    SQUARED,
    batches,
    gaussian_prior,
    lora_loss,
    lora_pair,
    posterior_of,
    relative,
    run_beside_reference,
    step_of,
    train,
    trained_pair,
)

from axolotl_ivon import IVONLoRA, effective_sample_size
from axolotl_ivon.optim.kernels.base import ESS_CEILING, ESS_FLOOR, PRECISION_CEILING, PRECISION_FLOOR

pytestmark = pytest.mark.usefixtures("both_kernels")

EMPIRICAL, FIXED, OWN = {"prior": "empirical"}, {"prior": 1e-2}, {"prior": gaussian_prior()}
RESCALED = {"rescale_lr": True, "lr": 0.5}


@pytest.mark.parametrize(("dtype", "micro_batches"), [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 1)])
@pytest.mark.parametrize("whole", [False, True], ids=["by tensor", "flat"])
@pytest.mark.parametrize(
    "changes",
    [
        *(prior | changes for prior in (EMPIRICAL, FIXED) for changes in ({}, RESCALED, SQUARED)),
        ADAM,
        *(OWN | changes for changes in ({"prior_strength": 0.3}, SQUARED, {**SQUARED, "prior_strength": 1.0})),
    ],
)
def test_follows_the_reference(dtype: torch.dtype, whole: bool, micro_batches: int, changes: dict[str, object]) -> None:
    pair = lora_pair(dtype=dtype)
    optimizer, references = run_beside_reference(pair, 100, micro_batches, whole, **changes)
    # What a draw in bfloat16 is rounded by is large beside a small σ₀.
    near = 1e-5 if dtype == torch.float32 or changes == EMPIRICAL else 2e-4
    for name, param in pair.items():
        mean = optimizer.mean(param)
        assert mean.dtype == torch.float32
        assert relative(mean, references[name].m) < near
        assert torch.equal(param.detach(), mean.to(dtype))
        assert relative(optimizer.sigma(param), references[name].sigma()) < near
        expected = SETTINGS["ess"] * references[name].delta()
        np.testing.assert_allclose(optimizer.prior_precision(param), expected, rtol=1e-4)
        assert (mean - lora_pair(dtype=dtype)[name]).abs().max() > 1e-3, "nothing moved, so nothing was compared"


@pytest.mark.parametrize("prior", [EMPIRICAL, {"prior": 1e-12}, OWN])
def test_follows_the_reference_at_the_lambda_of_many_examples_and_weights(prior: dict[str, object]) -> None:
    """At 1e15, of a million rows and 1e11 weights; h0 is by `auto` as much smaller as λ is larger.

    Only `auto` gets there: IVON's own estimate of the Hessian is as noisy as 1/σ.
    """
    pair = lora_pair()
    optimizer, references = run_beside_reference(pair, 100, **{**prior, **SQUARED, "ess": 1e15, "h0": 1e-12})
    for name, param in pair.items():
        assert relative(optimizer.mean(param), references[name].m) < 1e-4
        np.testing.assert_allclose(optimizer.sigma(param).cpu(), references[name].sigma(), rtol=1e-3)
        np.testing.assert_allclose(optimizer.prior_precision(param), 1e15 * references[name].delta(), rtol=1e-3)
    assert all(map(math.isfinite, optimizer.summary().values()))


def test_without_noise_adam_s_direction_is_adam() -> None:
    ours, theirs, betas, lr = lora_pair(), lora_pair(), (0.9, 0.96), 1e-3
    for pair in (ours, theirs):  # where B is 0, the gradient of A is that of the noise, however small
        nn.init.orthogonal_(pair["B"], generator=torch.Generator().manual_seed(0))
    hyper = {"hessian": "squared_gradients", "direction": "adam", "ess": 1e18, "h0": 1e-9, "clip": 0.01}
    train(IVONLoRA(ours.items(), lr=lr / 0.01, betas=betas, **hyper), ours, batches(30))
    adam = torch.optim.Adam(theirs.values(), lr=lr, betas=betas, eps=1e-30)
    for batch in batches(30):
        lora_loss(theirs, batch).backward()
        adam.step()
        adam.zero_grad()
    for name, param in ours.items():
        torch.testing.assert_close(param, theirs[name], rtol=0, atol=1e-4)  # steps are as long as 1e-3


def test_adam_s_direction_is_adam_s_where_the_number_of_losses_changes_from_step_to_step() -> None:
    """Of gradients that are noise of variance 1/B; Adam knows nothing of B."""
    generator, betas, lr = torch.Generator().manual_seed(0), (0.9, 0.99), 1e-3
    param, theirs = nn.Parameter(torch.zeros(40, 50)), nn.Parameter(torch.zeros(40, 50))
    hyper = {"hessian": "squared_gradients", "direction": "adam", "ess": 1e12, "h0": 1e-9, "clip": 0.01}
    optimizer = IVONLoRA([param], lr=lr / 0.01, betas=betas, **hyper)
    adam = torch.optim.Adam([theirs], lr=lr, betas=betas, eps=1e-30)
    reference = ReferenceIVON(
        param.detach().double().numpy(), 1e12, *betas, 1e-9, 0.01, hessian="squared_gradients", direction="adam"
    )
    for step in range(300):
        count = (4, 256)[step % 2]
        gradient = torch.randn(param.shape, generator=generator) / count**0.5
        optimizer.param_groups[0]["batch_size"] = reference.batch_size = count
        before = [param.detach().clone(), theirs.detach().clone()]
        with optimizer.sampled_params():
            param.grad = gradient.clone()
            draw = param.detach().double().numpy().copy()
        optimizer.step()
        theirs.grad = gradient
        adam.step()
        reference.step([draw], [gradient.double().numpy()], lr / 0.01)
        ours, adams = (float((p.detach() - was).abs().mean()) for p, was in zip((param, theirs), before, strict=True))
        assert step < 50 or 0.85 < ours / adams < 1.15
    assert relative(optimizer.mean(param), reference.m) < 1e-4


def test_at_a_temperature_lambda_times_tau_is_lambda_everywhere() -> None:
    states = []
    for hyper in ({"ess": 1e3, "tau": 64.0}, {"ess": 64e3}):
        pair, optimizer = trained_pair(batches(3), **hyper)
        states.append((*posterior_of(pair, optimizer), optimizer.summary()))
        param = next(iter(pair.values()))
        sigma = optimizer.sigma(param)
        optimizer.adopt_parameters({param: sigma})
        torch.testing.assert_close(optimizer.sigma(param), sigma, rtol=1e-6, atol=0)
    (*ours, summary), (*theirs, of_lambda) = states
    assert all(map(torch.equal, ours, theirs))
    assert (summary.pop("ivon_ess"), of_lambda.pop("ivon_ess")) == (1e3, 64e3)
    assert summary == of_lambda


def test_sigma_its_square_and_its_inverse_are_normal_at_every_bound() -> None:
    tiny = torch.finfo(torch.float32).tiny
    for ess in (ESS_FLOOR, ESS_CEILING):
        param = nn.Parameter(torch.ones(2))
        optimizer = IVONLoRA([param], ess=ess)
        optimizer.sigma(param)
        optimizer.state[param]["precision"].copy_(torch.tensor([PRECISION_FLOOR, PRECISION_CEILING]))
        sigma = optimizer.sigma(param)
        for values in (sigma, sigma.square(), sigma.square().reciprocal()):
            assert (values >= tiny).all()
            assert values.isfinite().all()
        np.testing.assert_allclose(sigma.double().pow(-2), [ess * PRECISION_FLOOR, ess * PRECISION_CEILING], rtol=1e-5)
        with optimizer.sampled_params():
            param.grad = torch.zeros(2)
        optimizer.step()
        assert optimizer.mean(param).isfinite().all()


def test_with_a_posterior_as_prior_it_begins_at_its_sigma_at_any_lambda_and_at_the_parameters() -> None:
    for ess, strength in ((1e3, 1.0), (1e7, 0.2), (1e5, 100.0)):
        pair, prior = lora_pair(), gaussian_prior()
        optimizer = IVONLoRA(pair.items(), **{**SETTINGS, "ess": ess}, prior=prior, prior_strength=strength)
        for name, param in pair.items():
            assert torch.equal(param, lora_pair()[name])
            assert torch.equal(optimizer.mean(param), param)
            # Stronger than it was, the prior is narrower, and so is where it begins; what is saved stays.
            expected = prior[name][1] / max(1.0, strength) ** 0.5
            torch.testing.assert_close(optimizer.sigma(param), expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(optimizer.sigma_for_next_prior(param), prior[name][1], rtol=1e-4, atol=0)
            precision = strength / prior[name][1] ** 2
            torch.testing.assert_close(optimizer.prior_precision(param), precision, rtol=1e-5, atol=0)


def test_what_is_saved_counts_the_old_data_once_however_strong_the_prior() -> None:
    for strength in (0.5, 1.0, 100.0):
        pair = lora_pair()
        optimizer, _ = run_beside_reference(pair, 30, prior=gaussian_prior(), **{**SQUARED, "prior_strength": strength})
        for name, param in pair.items():
            of_prior = 1 / (SETTINGS["ess"] * gaussian_prior()[name][1] ** 2)
            known = optimizer.state[param]["precision"] - strength * of_prior
            assert (known > -1e-6).all(), "squared gradients add to the prior"
            if strength > 1:
                expected = (SETTINGS["ess"] * (known.clamp_min(0) + of_prior)).rsqrt()
                torch.testing.assert_close(optimizer.sigma_for_next_prior(param), expected, rtol=1e-4, atol=0)
                assert (optimizer.sigma(param) < optimizer.sigma_for_next_prior(param)).all()
            else:
                assert torch.equal(optimizer.sigma_for_next_prior(param), optimizer.sigma(param))
    param = lora_pair()["A"]
    empirical = IVONLoRA([param], **SETTINGS)
    assert torch.equal(empirical.sigma(param), empirical.sigma_for_next_prior(param))


def test_two_tasks_of_known_curvature_give_the_posterior_of_both() -> None:
    """Bayes' rule for Gaussians in closed form: precisions add up, and means are weighted by them; κ scales the old."""
    ess, s0 = 1e3, 0.5
    hessians = torch.tensor([[0.1, 4.0, 1.0], [3.0, 0.2, 1.0]]).unsqueeze(1).expand(2, 200, 3)
    targets = (0.1, -0.1)

    def learn(hessian: torch.Tensor, target: float, prior: object, strength: float) -> tuple:
        param = nn.Parameter(torch.zeros(200, 3))
        prior = {param: prior} if isinstance(prior, tuple) else prior
        optimizer = IVONLoRA(
            [param], lr=0.1, ess=ess, betas=(0.9, 0.997), h0=1.0, clip=math.inf, prior=prior, prior_strength=strength
        )
        sigmas = []
        for step in range(3000):
            with step_of(optimizer):
                (0.5 * hessian * (param - target).square()).sum().backward()
            if step >= 1500 and step % 10 == 0:
                sigmas.append(optimizer.sigma(param).square())
        return optimizer.mean(param), torch.stack(sigmas).mean((0, 1)).expand(200, 3).sqrt()

    first = learn(hessians[0], targets[0], s0, 1.0)
    for strength in (1.0, 0.25):
        mean, sigma = learn(hessians[1], targets[1], first, strength)
        old, new = strength * (hessians[0, 0] + s0), hessians[1, 0]
        torch.testing.assert_close(sigma[0] ** -2, ess * (old + new), rtol=0.03, atol=0)
        first_mean = hessians[0, 0] * targets[0] / (hessians[0, 0] + s0)
        torch.testing.assert_close(mean.mean(0), (old * first_mean + new * targets[1]) / (old + new), rtol=0, atol=1e-3)


def test_a_prior_that_does_not_fit_is_refused_with_the_name_of_the_parameter() -> None:
    good = gaussian_prior()
    mean, sigma = good["B"]
    for wrong, words in (
        ({"A": good["A"]}, "prior has no mean and σ of B"),
        ({**good, "B": (mean.T, sigma.T)}, r"prior of B must be .* got \[4, 16\], \[4, 16\], \[16, 4\]"),
        ({**good, "B": (mean, sigma * 0)}, "prior of B must have a finite mean and a positive σ"),
        ({**good, "B": (mean, sigma * math.nan)}, "prior of B must have a finite mean and a positive σ"),
        ({**good, "B": (mean * math.inf, sigma)}, "prior of B must have a finite mean and a positive σ"),
    ):
        pair = lora_pair()
        before = pair["A"].detach().clone()
        with pytest.raises(ValueError, match=words):
            IVONLoRA(pair.items(), prior=wrong, **SETTINGS)
        assert torch.equal(pair["A"], before)
    with pytest.raises(ValueError, match="rescale_lr must be False"):
        IVONLoRA(lora_pair().items(), prior=good, rescale_lr=True, **SETTINGS)


def test_groups_have_their_own_rate_and_prior_and_one_that_is_added_later_needs_its_own() -> None:
    pair, prior = lora_pair(), gaussian_prior()
    groups = [{"params": [("A", pair["A"])], "prior": prior, "lr": 0.0}, {"params": [("B", pair["B"])], "prior": 0.25}]
    optimizer = IVONLoRA(groups, **SETTINGS)
    train(optimizer, pair, batches(1))
    assert torch.equal(pair["A"], lora_pair()["A"])
    assert pair["B"].abs().max() > 0
    assert optimizer.prior_precision(pair["B"]) == pytest.approx(0.25 * SETTINGS["ess"])
    assert set(optimizer.state[pair["A"]]) - set(optimizer.state[pair["B"]]) == {"prior_mean", "prior_precision"}
    later = IVONLoRA([("A", pair["A"])], prior=prior, **SETTINGS)
    with pytest.raises(ValueError, match="prior must be"):
        later.add_param_group({"params": [("B", pair["B"])]})
    later.add_param_group({"params": [("B", pair["B"])], "prior": prior})
    torch.testing.assert_close(later.sigma(pair["B"]), prior["B"][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rescale_lr", [False, True])
def test_equals_ivon_opt_with_a_fixed_prior(rescale_lr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """m against the peer in float32, which rounds as ours does; σ against the peer in float64."""
    ours, delta = nn.Parameter(lora_pair()["A"].detach()), 1e-2
    start = ours.detach().clone()
    lr = SETTINGS["lr"] / (SETTINGS["h0"] + delta) if rescale_lr else SETTINGS["lr"]
    optimizer = IVONLoRA([ours], prior=delta, rescale_lr=rescale_lr, **{**SETTINGS, "lr": lr})
    peers, options = {}, {"lr": lr, "ess": SETTINGS["ess"], "hess_init": SETTINGS["h0"], "beta1": 0.9, "beta2": 0.9995}
    options |= {"weight_decay": delta, "clip_radius": SETTINGS["clip"], "rescale_lr": rescale_lr}
    for dtype in (torch.float32, torch.float64):
        theirs = nn.Parameter(ours.detach().clone().to(dtype))
        peers[dtype] = theirs, ivon.IVON([theirs], **options)
    target = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)

    def loss(param: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(param.dtype)
        return (weight * (param - target.to(param.dtype)).square()).mean() + (param.sin() * weight).mean()

    for step in range(100):
        weight = torch.rand(ours.shape, generator=torch.Generator().manual_seed(step))
        with step_of(optimizer):
            noise = ((ours.detach() - optimizer.mean(ours)) / optimizer.sigma(ours)).flatten()
            loss(ours, weight).backward()
        for dtype, (theirs, peer) in peers.items():
            draw = noise.to(dtype)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *_, draw=draw, **__: draw)
                with peer.sampled_params(train=True):
                    peer.zero_grad()
                    loss(theirs, weight).backward()
            peer.step()
    precision = peers[torch.float64][1].param_groups[0]["hess"] + delta
    sigma = 1 / (precision * SETTINGS["ess"]).sqrt()
    assert relative(ours.detach(), peers[torch.float32][0].detach().double().numpy()) < 1e-6
    assert relative(optimizer.sigma(ours).flatten(), sigma.numpy()) < 1e-6
    assert (ours - start).abs().max() > 1e-3, "nothing moved, so nothing was compared"


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(
    gradients=st.lists(st.lists(floats, min_size=6, max_size=6), min_size=1, max_size=12),
    start=st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6),
    ess=st.sampled_from([1.0, 5e3, 1e7, 1e18]),
    prior=st.sampled_from(["empirical", 0.0, 1e-3, 1e-6j, 1e6j]),
    micro_batches=st.sampled_from([1, 3]),
)
def test_whatever_finite_gradients_come_sigma_stays_positive_and_finite(
    gradients: list[list[float]], start: list[float], ess: float, prior: object, micro_batches: int
) -> None:
    params = [nn.Parameter(torch.tensor(start[:5])), nn.Parameter(torch.tensor(start[5:]))]
    if isinstance(prior, complex):  # σ₀ of a prior of every weight's own
        prior = {param: (param.detach().clone(), torch.full_like(param, prior.imag)) for param in params}
    optimizer = IVONLoRA(params, lr=1.0, ess=ess, betas=(0.9, 0.9), h0=1e-3, clip=1.0, prior=prior)
    for values in gradients:
        for _ in range(micro_batches):
            with optimizer.sampled_params():
                params[0].grad, params[1].grad = torch.tensor(values[:5]), torch.tensor(values[5:])
        optimizer.step()
        optimizer.zero_grad()
    for param in params:
        assert all(values.isfinite().all() for values in (optimizer.sigma(param), param, optimizer.mean(param)))
        assert (optimizer.sigma(param) > 0).all()


def test_the_mean_is_back_after_the_context_and_after_an_exception() -> None:
    pair, optimizer = trained_pair()
    mean = {name: param.detach().clone() for name, param in pair.items()}
    with optimizer.sampled_params():
        assert optimizer.sampling
        assert not torch.equal(pair["A"], mean["A"])
        assert torch.equal(optimizer.mean(pair["A"]), mean["A"])
    assert torch.equal(pair["A"], mean["A"])
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params():
        lora_loss(pair, batches(1)[0]).backward()
        raise ZeroDivisionError
    assert not optimizer.sampling
    assert all(torch.equal(param, mean[name]) for name, param in pair.items())
    assert pair["A"].grad is None, "a draw that failed does not count"


def test_passes_inside_may_see_the_mean_or_another_draw() -> None:
    """And the estimate is of the draw that is there in the end, which its number brings back."""
    sigmas = []
    for number in (1, 3):
        pair, optimizer = trained_pair()
        with pytest.raises(RuntimeError, match="outside of sampled_params"):
            optimizer.redraw(1)
        with optimizer.sampled_params():
            assert optimizer.draw_number == 1
            first = pair["A"].detach().clone()
            optimizer.redraw(None)
            assert torch.equal(pair["A"], lora_pair()["A"])
            optimizer.redraw(3)
            assert not torch.equal(pair["A"], first)
            optimizer.redraw(number)
            assert torch.equal(pair["A"], first) is (number == 1)
            lora_loss(pair, batches(1)[0]).backward()
        optimizer.step()
        sigmas.append(optimizer.sigma(pair["B"]))
    pair, optimizer = trained_pair(batches(1))
    assert torch.equal(optimizer.sigma(pair["B"]), sigmas[0])
    assert not torch.equal(*sigmas)


def test_a_failed_micro_batch_leaves_the_others_as_they_were() -> None:
    pair, optimizer = trained_pair()
    with optimizer.sampled_params():
        lora_loss(pair, batches(1)[0]).backward()
    with pytest.raises(KeyError), optimizer.sampled_params():
        lora_loss(pair, batches(2)[1]).backward()
        raise KeyError
    optimizer.step()
    assert all(map(torch.equal, posterior_of(pair, optimizer), posterior_of(*trained_pair(batches(1)))))


def test_draws_have_the_posterior_s_mean_and_deviation() -> None:
    param = nn.Parameter(torch.full((20_000,), 0.5))
    optimizer = IVONLoRA([param], ess=100.0, h0=0.04, prior=0.0)
    draws = []
    for _ in range(2):
        with optimizer.sampled_params():
            draws.append(param.detach().clone())
    sigma = 1 / math.sqrt(100 * 0.04)
    for draw in draws:
        assert draw.mean().item() == pytest.approx(0.5, abs=5 * sigma / math.sqrt(20_000))
        assert draw.std().item() == pytest.approx(sigma, rel=0.03)
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"seed": 3}, {"ess": 1.0, "seed": 9}),
        (ADAM, {"ess": 1.0}),
        ({**SQUARED, "prior": gaussian_prior()}, {**SETTINGS, **SQUARED, "prior": gaussian_prior()}),
        ({**SQUARED, "prior": gaussian_prior()}, {**SETTINGS, **SQUARED}),
    ],
    ids=["", "adam", "prior given again", "prior from the state"],
)
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype, options: dict, again: dict) -> None:
    data, file = batches(20), io.BytesIO()
    straight, optimizer = trained_pair(data[:10], dtype, **options)
    torch.save(optimizer.state_dict(), file)
    resumed = lora_pair(9, dtype)
    other = IVONLoRA(resumed.items(), **again)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, resumed.values(), straight.values())), "whatever they held"
    for opt, pair in ((optimizer, straight), (other, resumed)):
        train(opt, pair, data[10:])
    assert all(map(torch.equal, resumed.values(), straight.values()))
    assert all(map(torch.equal, posterior_of(straight, optimizer), posterior_of(resumed, other)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_put_into_the_parameters_can_be_adopted(dtype: torch.dtype) -> None:
    pair, optimizer = trained_pair(batches(3), dtype)
    mean, sigma = optimizer.mean(pair["A"]), optimizer.sigma(pair["A"])
    other = lora_pair(9, dtype)
    with torch.no_grad():
        pair["B"].copy_(other["A"].T[:16])
    optimizer.adopt_parameters()
    assert torch.equal(optimizer.mean(pair["A"]), mean), "what nobody changed keeps all its digits"
    assert torch.equal(optimizer.mean(pair["B"]), other["A"].T[:16].float())
    with optimizer.sampled_params():
        pass
    assert torch.equal(pair["B"], other["A"].T[:16])
    assert torch.equal(optimizer.sigma(pair["A"]), sigma)


def test_loading_a_state_of_another_shape_is_refused() -> None:
    small, large = (IVONLoRA([nn.Parameter(torch.ones(size))], ess=1e3) for size in (3, 4))
    small.summary()  # which makes its state
    small.param_groups[0]["ess"] = 7.0
    before, mean = copy.deepcopy(large.state_dict()), large.param_groups[0]["params"][0].clone()
    with pytest.raises(ValueError, match=r"shapes .*\(3,\).* \(4,\)"):
        large.load_state_dict(small.state_dict())
    assert repr(large.state_dict()) == repr(before)
    assert torch.equal(large.param_groups[0]["params"][0], mean)
    with large.sampled_params():
        large.param_groups[0]["params"][0].square().sum().backward()
    with pytest.raises(ValueError, match="shapes"):
        large.load_state_dict(small.state_dict())
    large.step()  # of the draw before


def test_parameters_of_other_dtypes_are_refused() -> None:
    for dtype in (torch.float64, torch.int64):
        parameter = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"float32, bfloat16 or float16 parameters, got {dtype}"):
            IVONLoRA([parameter], ess=1e3)


def test_a_copied_or_pickled_optimizer_keeps_its_state() -> None:
    pair, optimizer = trained_pair(batches(3))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(optimizer)):
        param = other.param_groups[0]["params"][0]
        assert torch.equal(other.sigma(param), optimizer.sigma(pair["A"]))
        with step_of(other):
            param.sum().backward()


def test_dtypes_and_frozen_parameters_may_be_mixed() -> None:
    params = [nn.Parameter(torch.ones(8, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float16)]
    frozen = nn.Parameter(torch.ones(8), requires_grad=False)
    optimizer = IVONLoRA([*params, frozen], **SETTINGS)
    for trained in (False, True):
        frozen.requires_grad_(trained)
        before = frozen.detach().clone()
        with step_of(optimizer):
            assert torch.equal(frozen, before) != trained
            sum(param.float().square().sum() for param in (*params, frozen)).backward()
        assert torch.equal(frozen, before) != trained
    for param in params:
        assert optimizer.sigma(param).dtype == torch.float32
        assert optimizer.mean(param).max() < 1


def test_a_parameter_without_gradient_in_one_micro_batch_keeps_what_the_other_gave() -> None:
    """As with experts: a tensor that no token of a micro-batch reached has no gradient there."""
    results = []
    for reach_twice in (True, False):
        pair, optimizer = trained_pair()
        with optimizer.sampled_params():
            pair["A"].square().sum().backward()
        with optimizer.sampled_params():
            (pair["B"].sum() + (0 * pair["A"].sum() if reach_twice else 0)).backward()
        optimizer.step()
        results.append((pair["A"].detach(), optimizer.sigma(pair["A"]), optimizer.sigma(pair["B"])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_dropping_the_gradients_drops_their_hessian_estimates() -> None:
    results = []
    for has_gradients in (True, False):
        pair, optimizer = trained_pair()
        with optimizer.sampled_params():
            if has_gradients:
                lora_loss(pair, batches(1)[0]).backward()
        for param in pair.values():  # as model.zero_grad() does
            param.grad = None
        train(optimizer, pair, batches(2)[1:])
        results.append(posterior_of(pair, optimizer))
    assert all(map(torch.equal, *results))


def test_a_loss_scaler_changes_nothing_and_an_overflow_skips() -> None:
    results = []
    for scaled in (False, True):
        pair, optimizer = trained_pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        for index, batch in enumerate(batches(6)):
            with optimizer.sampled_params():
                scaler.scale(lora_loss(pair, batch)).backward()
                if scaled and index == 5:
                    pair["A"].grad[0, 0] = math.inf
            if index == 5 and not scaled:
                break
            if index % 2:  # clipping code unscales first
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((pair["A"].detach(), optimizer.sigma(pair["A"]), optimizer.sigma(pair["B"])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def test_closure_runs_at_a_draw() -> None:
    (pair, optimizer), (other, by_hand), [batch] = trained_pair(), trained_pair(), batches(1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        assert optimizer.sampling
        loss = lora_loss(pair, batch)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    with step_of(by_hand):
        expected = lora_loss(other, batch)
        expected.backward()
    assert loss.item() == expected.item()
    assert torch.equal(pair["B"], other["B"])


def test_misuse_is_refused() -> None:
    pair, optimizer = trained_pair()
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="inside sampled_params"):
        optimizer.step()
    again = optimizer.sampled_params()
    with pytest.raises(RuntimeError, match="inside sampled_params"), optimizer.sampled_params(), again:
        pass
    lora_loss(pair, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="not taken at a draw"):
        optimizer.step()
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        optimizer.sigma(torch.ones(3))


BAD = {
    "lr": (-1.0, math.nan),
    "ess": (0.0, 1e19, math.inf),
    "betas": ((0.9, 1.0), (-0.1, 0.9)),
    "h0": (0.0, math.nan, 1e-50, 1e30),
    "clip": (0.0, math.nan),
    "rescale_lr": (1,),
    "prior": ("flat", -1e-3),
    "seed": (-1, 0.5),
    "direction": ("down",),
    "tau": (0.0, 1e17, math.inf),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_hyperparameters_raise_with_their_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        IVONLoRA([nn.Parameter(torch.ones(2))], **{"ess": 1e3, name: value})
    assert repr(value) in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    bad_steps=st.sets(st.integers(0, 11)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf, 3e38]),
    spoiled=st.sampled_from(["A", "B"]),
    micro_batches=st.sampled_from([1, 2]),
    zero=st.booleans(),
)
def test_bad_gradients_at_any_steps_leave_the_last_good_state(
    bad_steps: set[int], bad: float, spoiled: str, micro_batches: int, zero: bool
) -> None:
    """A run with bad steps ends where the run ends that has no gradient at all at those steps."""
    results = []
    for has_bad in (True, False):
        pair, optimizer = trained_pair()
        for step, batch in enumerate(batches(12)):
            for micro in range(micro_batches):
                with optimizer.sampled_params():
                    (lora_loss(pair, batch) * (0 if zero else 1)).backward()
                    if step in bad_steps and micro == 0:
                        pair[spoiled].grad[1, 1] = bad
            if step in bad_steps and not has_bad:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            if has_bad and step in bad_steps:
                assert optimizer.skipped.tensor == (spoiled if abs(bad) != 3e38 else "all tensors together")
                assert optimizer.skipped.in_a_row >= 1
            elif has_bad:
                assert optimizer.skipped.in_a_row == 0
        assert optimizer.skipped_steps == (len(bad_steps) if has_bad else 0)
        state = optimizer.state_dict()["state"].values()
        results.append([value for tensors in state for value in tensors.values()])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
        assert right.isfinite().all()


@pytest.mark.parametrize("lr", [0.0, 1e-30, 1e3, 1e30, 1e300])
@pytest.mark.parametrize("clip", [1e-2, math.inf])
@pytest.mark.parametrize("prior", ["empirical", 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rescale_lr", [False, True])
def test_no_learning_rate_brings_a_nan(
    lr: float, clip: float, prior: object, dtype: torch.dtype, rescale_lr: bool
) -> None:
    one = nn.Parameter(torch.full((1,), 0.3, dtype=dtype))  # a tensor of one weight, of one training example
    pair = {"one": one, **lora_pair(dtype=dtype)}
    ess = effective_sample_size(1)
    optimizer = IVONLoRA(pair.items(), lr=lr, ess=ess, clip=clip, prior=prior, rescale_lr=rescale_lr)
    start = {name: optimizer.mean(param) for name, param in pair.items()}
    for batch in batches(40):
        with step_of(optimizer):
            (lora_loss(pair, batch) + (one.float() - 1).square().sum()).backward()
            one.grad.nan_to_num_(0.0, 0.0, 0.0)  # a weight that the loss does not see, be it infinite
    for name, param in pair.items():
        assert all(values.isfinite().all() for values in (optimizer.mean(param), optimizer.sigma(param)))
        assert (optimizer.sigma(param) > 0).all()
        if lr == 0:
            assert torch.equal(optimizer.mean(param), start[name])


def test_a_constant_loss_and_zero_gradients_move_nothing_but_sigma() -> None:
    pair, optimizer = trained_pair()
    before = {name: optimizer.sigma(param) for name, param in pair.items()}
    for _ in range(50):
        with step_of(optimizer):
            (0 * sum(param.sum() for param in pair.values()) + 3).backward()
    assert torch.equal(pair["A"], lora_pair()["A"])
    assert (optimizer.sigma(pair["A"]) > before["A"]).all(), "a loss that says nothing leaves the prior, which is wider"
    torch.testing.assert_close(optimizer.sigma(pair["B"]), before["B"], rtol=1e-5, atol=0)  # at 0 it is the prior


def test_empty_groups_and_empty_tensors_are_left_alone() -> None:
    pair = lora_pair()
    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = IVONLoRA([{"params": [*pair.values(), empty]}, {"params": []}], **SETTINGS)
    for batch in batches(3):
        with step_of(optimizer):
            lora_loss(pair, batch).backward()
            empty.grad = torch.zeros(0, 3)
    assert all(map(torch.equal, posterior_of(pair, optimizer), posterior_of(*trained_pair(batches(3)))))


def test_a_tensor_that_thaws_later_starts_where_a_new_one_would() -> None:
    late, fresh = lora_pair(1), lora_pair(1)
    for param in late.values():
        param.requires_grad_(False)
    early = nn.Parameter(torch.ones(3, 3))
    optimizer = IVONLoRA([*late.items(), ("early", early)], **SETTINGS)
    data = batches(8)
    for batch in data:
        if batch is data[4]:
            for param in late.values():
                param.requires_grad_(True)
        with step_of(optimizer):
            loss = early.square().sum()
            if late["A"].requires_grad:
                loss = loss + lora_loss(late, batch)
            loss.backward()
    other = IVONLoRA(fresh.items(), **SETTINGS)
    other.param_groups[0]["draws"] = 4  # so that the draws are the same
    train(other, fresh, data[4:])
    for name in fresh:
        torch.testing.assert_close(late[name], fresh[name], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(optimizer.sigma(late[name]), other.sigma(fresh[name]), rtol=1e-6, atol=0)


def test_nothing_grows_with_the_number_of_steps() -> None:
    pair, optimizer = trained_pair()

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # dead proxies have a type too

    counts = []
    for _ in range(3):
        train(optimizer, pair, batches(20))
        counts.append(held())
    assert counts[1] == counts[2]
    state = optimizer.state_dict()["state"].values()
    weights = sum(param.numel() for param in pair.values())
    assert sum(value.nbytes for tensors in state for value in tensors.values()) == 12 * weights + 4 * len(pair)


def test_processes_with_draws_of_their_own_take_the_step_of_all_their_draws() -> None:
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(3)) * 0.1
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [IVONLoRA([param], **SETTINGS) for param in params]
    optimizers[1].process = 1
    reference = ReferenceIVON(
        start.double().numpy(), SETTINGS["ess"], *SETTINGS["betas"], SETTINGS["h0"], SETTINGS["clip"]
    )
    for step in range(20):
        thetas, gradients, held = [], [], []
        for process, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            with optimizer.sampled_params():
                (param.sin() * (1 + process + step % 3)).mean().backward()
                thetas.append(param.detach().double().numpy().copy())
                gradients.append(param.grad.double().numpy() / 2)
            held.append([])
            optimizer.synchronize(held[-1].extend)
        assert not np.allclose(thetas[0], thetas[1])
        means = [(a + b) / 2 for a, b in zip(*held, strict=True)]
        for optimizer in optimizers:
            optimizer.synchronize(partial(torch._foreach_copy_, src=means))
            optimizer.step()
            optimizer.zero_grad()
        reference.step(thetas, gradients, SETTINGS["lr"])
        assert torch.equal(params[0], params[1])
        assert relative(optimizers[0].mean(params[0]), reference.m) < 1e-5
        assert relative(optimizers[0].sigma(params[0]), reference.sigma()) < 1e-5
