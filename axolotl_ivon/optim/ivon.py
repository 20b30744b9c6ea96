"""IVONLoRA: the variational optimizer of IVON-LoRA.

Sources: IVON-LoRA (arXiv 2506.14280), on IVON (arXiv 2402.17641, Algorithm 1). The posterior is
q = N(m, diag(σ²)) with σ² = 1/(λ·p), where p is the posterior precision over the effective sample size λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..settings.table import ADDED_LATER
from . import kernels
from .buffers import Buffers, tempered_ess
from .kernels.base import (
    ESS_CEILING,
    ESS_FLOOR,
    MAX_STEP,
    PRECISION_CEILING,
    PRECISION_FLOOR,
    Constants,
    StepDecision,
    Terms,
    to_device,
)
from .summary import summarize

# Options that the groups of earlier versions do not have.
_ADDED = {**ADDED_LATER, "batch_size": 1, "tau": 1.0}
# What a prior of every weight's own is in a group, once its m₀ and σ₀ are in the state.
_GAUSSIAN = "gaussian"
# m₀ and σ₀ of the tensors, by the parameters' names or by the parameters.
GaussianPrior = Mapping[str | Tensor, tuple[Tensor, Tensor]]
# Steps skipped in total and in a row, and the number of a tensor.
_NOTHING_SKIPPED = (0, 0, 0)


class Skipped(NamedTuple):
    """The steps that were skipped because the norm of their gradient was not finite.

    `total` counts all of them and `in_a_row` the latest without a step between them; `tensor` is the first tensor, by
    its name where the optimizer was given names, whose gradient was not finite in the latest (None before any).
    """

    total: int
    in_a_row: int
    tensor: str | None


class IVONLoRA(Optimizer):
    """Variational optimizer for LoRA weights: learns a mean m and a standard deviation σ for every weight.

    One step t, for every tensor i:

        θ  = m + σ·ε,  ε ~ N(0, I)                          sample, then forward and backward at θ
        ĝ  = ∇ℓ(θ)                                          mean loss of the batch
        ĥ  = ĝ·(θ−m)/σ²                                     σ is the one that θ was drawn with
        g ← β1·g + (1−β1)·ĝ
        δ_i = 1 / (λ·mean_j(m_ij² + σ_ij²))                 the KL-optimal prior
        p ← β2·p + (1−β2)·(ĥ+δ) + ½(1−β2)²·(p−ĥ−δ)²/p       the precision over λ, prior included
        m ← m − α·clip((g/(1−β1^t))/p, ±ξ)                  with a fixed δ: (g/(1−β1^t) + δ·m)/p
        σ ← 1/√(λ·p)

    It starts from m = the parameters, g = 0 and p = h0 + δ, with δ at σ² = 1/(λ·h0). With `rescale_lr` α is (h0 + δ)·α
    in the update of m.

    The prior may be an earlier posterior N(m₀, σ₀²), to learn new data without forgetting the old: then δ = κ/(λ·σ₀²)
    for every weight, the term on the mean is δ·(m − m₀), and it starts from p = 1/(λ·σ₀²) (for κ > 1 from the prior,
    p = δ). m starts from the parameters here too: load the earlier adapter first to go on where its run left off.

    ĥ of one draw has a standard deviation of |ĝ|/σ, far above the Hessian itself: hundreds of steps do not separate
    the weights of a tensor. With `hessian="squared_gradients"` ĥ = B·ĝ² instead, which has the Fisher information
    of one example as its mean where gradients of examples are independent and have mean 0 (as in VOGN, arXiv
    1806.04854), and a relative standard deviation of √2. It is not negative, so p is its plain running average,
    p ← β2·p + (1−β2)·(ĥ+δ).

    Then p holds E[ĝ²], and `direction="adam"` goes by it as Vadam does (arXiv 1806.04854, with the prior left to p):

        m ← m − α·ξ·clip((g/(1−β1^t))/√E[ĝ²], ±1)            E[ĝ²] = E[B·ĝ²]·E[1/B] is debiased, as Adam's is

    With "newton", g/p is often cut at ±ξ for nearly all weights. A step is then a sign, several times longer than
    Adam's at the same rate if gradients are mostly noise. Steps of "adam" are as long as Adam's.

    Run every forward and backward pass inside `sampled_params()`, which puts a draw θ = m + σ·ε into the
    parameters, and call `step()` outside of it. With gradient accumulation, enter it once for each
    micro-batch (with the loss divided by their number, as usual): each gets a draw of its own.

        with optimizer.sampled_params():
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    That is a loop of your own; `save_posterior(model, optimizer, "out/")` then saves the adapter with its σ. In a
    transformers or TRL Trainer call `attach(trainer)` instead. The defaults here are the paper's for commonsense;
    `attach` and the YAML choose by their preset `auto`.

    Do not clip the gradients before `step()`: the Hessian estimate needs them as they are, and `clip` bounds
    the step instead.

    From the first draw on the mean is in the state. `load_state_dict` puts it into the parameters; after other weights
    were loaded into them without a state, call `adopt_parameters()`.

    Args:
        params: what `torch.optim` takes: parameters, named parameters, or groups; a group may have its own
            value of anything below but `seed`. They may lie on several devices and be float32, bfloat16 or
            float16; the state is float32 throughout.
        lr: learning rate α. It is far larger than Adam's (1e-2 … 1e-1), since `clip` bounds the step.
        ess: effective sample size λ; see `effective_sample_size`.
        betas: β1 of the gradient's and β2 of the precision's running average.
        h0: initial Hessian.
        clip: ξ, bound on the preconditioned gradient of each weight; `math.inf` for none.
        prior: "empirical" for the KL-optimal prior of each tensor (arXiv 2506.14280, Eq. 2); a number δ for IVON's
            fixed prior, which then acts as its weight decay; or a mapping from the names of the parameters (or the
            parameters) to (m₀, σ₀), tensors of their shapes with σ₀ > 0, for N(m₀, σ₀²/κ). It has an entry for every
            parameter of the group; others are ignored. h0 is not used then, and of the state m₀ and 1/σ₀² are two
            more float32 tensors for each parameter.
        prior_strength: κ, a factor on δ. Below 1 the prior is κ^(−½) as wide, and σ shows more of the data.
        hessian: "reparameterized" for IVON's ĥ, or "squared_gradients" for ĥ = B·ĝ².
        batch_size: B, the number of losses whose mean a step's gradient is of (tokens of a language model, examples of
            a classifier), over its micro-batches, and over processes that share a draw; for squared gradients alone.
            It is an option of the groups, so it may be set anew before a step.
        direction: "newton" for g/p, or "adam" for ξ·g/√E[ĝ²], which needs squared gradients and the empirical prior.
        tau: temperature τ of the posterior: λ·τ takes the place of λ, and σ is 1/√τ as wide, in training as afterwards.
        h0_steps: k, how many steps h0 counts as: in step t, 1−β2 is 1/(t+k) as long as that is larger than the one of
            `betas`, so the start is soon forgotten. None: the same β2 in every step.
        rescale_lr: whether the learning rate of a tensor is (h0 + δ)·α, the optional line of IVON's Algorithm 1. A step
            from p = h0 + δ is then as long as the gradient, so α is of the size that it has for SGD.
        seed: seed of the draws. A draw depends on the seed, the number of draws before it and the place of
            the tensor alone, so a resumed run continues with the draws that it would have had.

    Raises:
        ValueError: for a hyperparameter out of range, with its value.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        ess: float,
        betas: tuple[float, float] = (0.9, 0.9995),
        h0: float = 5e-2,
        clip: float = 5e-3,
        prior: Literal["empirical"] | float | GaussianPrior = "empirical",
        prior_strength: float = 1.0,
        hessian: Literal["reparameterized", "squared_gradients"] = "reparameterized",
        batch_size: int = 1,
        direction: Literal["newton", "adam"] = "newton",
        tau: float = 1.0,
        h0_steps: float | None = None,
        rescale_lr: bool = False,
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "ess": ess, "betas": betas, "h0": h0, "clip": clip, "prior": prior}
        defaults |= {"prior_strength": prior_strength, "hessian": hessian, "batch_size": batch_size}
        defaults |= {"direction": direction, "tau": tau}
        defaults |= {"h0_steps": h0_steps, "rescale_lr": rescale_lr, "seed": seed, "draws": 0}
        _check_hyperparameters(defaults)
        kernels.wanted()  # complains of a name that means nothing
        self._buffers: list[Buffers] | None = None
        self.process = 0  # number of the process, where each has draws of its own: see synchronize()
        self._drawn = False
        self.stepping = False  # whether a step is being taken, when m and the parameters may differ: a signal may come
        self._at_draw: Tensor
        self._report: Sequence[int] | Tensor = _NOTHING_SKIPPED
        super().__init__(params, defaults)
        if isinstance(prior, Mapping):
            self.defaults["prior"] = _GAUSSIAN  # the tensors are in the state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers, self._drawn, self.stepping = None, False, False
        self.__dict__.setdefault("_report", _NOTHING_SKIPPED)
        self.__dict__.setdefault("process", 0)
        for group in self.param_groups:
            for name, value in _ADDED.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in `torch.optim.Optimizer`."""
        for values in (self.defaults, param_group):  # NumPy's numbers cannot be loaded from a checkpoint
            values.update({name: without_numpy(value) for name, value in values.items() if name != "params"})
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"IVONLoRA optimizes float32, bfloat16 or float16 parameters, got {param.dtype}")
        if isinstance(group["prior"], Mapping):
            self._keep_prior(group, group["prior"])
        self._buffers = None

    @torch.no_grad()
    def _keep_prior(self, group: dict[str, Any], prior: GaussianPrior) -> None:
        """Put m₀ and 1/σ₀² of a new group into the state."""
        tensors = []
        for name, param in zip(_names(group), group["params"], strict=True):
            given = prior.get(name, prior.get(param))
            if given is None:
                raise ValueError(f"prior has no mean and σ of {name}")
            mean, sigma = (torch.as_tensor(value).to(param.device, torch.float32, copy=True) for value in given)
            if mean.shape != param.shape or sigma.shape != param.shape:
                shapes = ", ".join(str(list(value.shape)) for value in (mean, sigma, param))
                raise ValueError(f"prior of {name} must be a mean and a σ of its shape, got {shapes}")
            precision = sigma.double().square().reciprocal().float()
            delta = precision * (group["prior_strength"] / tempered_ess(group))
            if not (mean.isfinite().all() and ((sigma > 0) & (delta < PRECISION_CEILING)).all()):
                raise ValueError(f"prior of {name} must have a finite mean and a positive σ everywhere")
            tensors.append((mean, precision))
        group["prior"] = _GAUSSIAN
        for param, (mean, precision) in zip(group["params"], tensors, strict=True):
            self.state[param] = dict(zip(Buffers.PRIOR, (mean, precision), strict=True))

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """Put a draw θ ~ q into the parameters inside the context, and the mean outside of it.

        On leaving, `.grad` holds the gradient that was taken inside, summed over the draws since the last
        `step()`, and beside it is kept the Hessian estimate ĥ = ĝ·(θ−m)/σ². After an exception the mean is
        back and the draw does not count.

        Raises:
            RuntimeError: if entered while a draw is in the parameters already.
        """
        if self._drawn:
            raise RuntimeError("sampled_params() was entered inside sampled_params()")
        all_buffers = self._get_buffers()
        self._drawn = True
        try:
            for group in self.param_groups:
                group["draws"] += 1
            for buffers in all_buffers:
                buffers.set_gradients_aside()
                self._draw(buffers, buffers.group["draws"])
            yield
            first = all(buffers.h_hat is None for buffers in all_buffers)
            squares = self._here([buffers.collect() for buffers in all_buffers])  # of ĝ, and beside it ĥ
            # What was not finite stays so until the next step, whatever the draws after it add.
            self._at_draw = squares if first else torch.where(self._at_draw.isfinite(), squares, self._at_draw)
        except BaseException:
            for buffers in all_buffers:
                buffers.restore_mean()
                buffers.put_gradients_back(add=False)
            raise
        finally:
            self._drawn = False

    def redraw(self, number: int | None) -> None:
        """Put the draw of this number, or the mean, into the parameters inside `sampled_params()`.

        It is for passes that must see something else than the draw of the gradient. Draws are numbered from 1 in the
        order in which `sampled_params()` takes them (`draw_number`), and the same m and σ give the same draw again.
        Before the context is left the draw of the gradient must be back, since ĥ is taken at what is there.

        Args:
            number: of the draw; None for the mean.

        Raises:
            RuntimeError: if called outside of `sampled_params()`.
        """
        if not self._drawn:
            raise RuntimeError("redraw() was called outside of sampled_params(); call it inside the context")
        for buffers in self._get_buffers():
            if number is None:
                buffers.restore_mean()
            else:
                self._draw(buffers, number)

    @property
    def draw_number(self) -> int:
        """The number of the latest draw of `sampled_params()`."""
        return int(self.param_groups[0]["draws"])

    def _draw(self, buffers: Buffers, number: int) -> None:
        number_of = f"{number} of process {self.process}" if self.process else number
        buffers.draw(number_of, tempered_ess(buffers.group))

    @contextmanager
    def evaluation_draw(self, number: int, tau: float = 1.0) -> Iterator[None]:
        """Put a draw θ ~ N(m, σ²/τ) into the parameters to evaluate it, and the mean back afterwards.

        Neither the gradients nor the draws of training are touched; the same number always gives the same noise.

        Raises:
            RuntimeError: if entered while a draw is in the parameters already.
        """
        if self._drawn:
            raise RuntimeError("evaluation_draw() was entered inside sampled_params()")
        all_buffers = self._get_buffers()
        self._drawn = True
        try:
            for buffers in all_buffers:
                buffers.draw(f"evaluation {number}", tempered_ess(buffers.group) * tau)
            yield
        finally:
            for buffers in all_buffers:
                buffers.restore_mean()
            self._drawn = False

    @property
    def sampling(self) -> bool:
        """Whether the parameters hold a draw at this moment, and not the mean."""
        return self._drawn

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update m, σ and the momentum from the gradients taken at the draws since the last step.

        If the gradient's norm is not finite the step is skipped: nothing changes but `skipped`.

        Args:
            closure: computes the loss and its gradient; it is called once, inside `sampled_params()`.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: if called inside `sampled_params()`, or if the gradients were not taken at a draw.
        """
        if self._drawn:
            raise RuntimeError("step() was called inside sampled_params(); call it after the context")
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.sampled_params():
                loss = closure()
        all_buffers = self._get_buffers()
        if not self._gradients():
            return loss
        if not any(buffers.h_hat is not None for buffers in all_buffers):
            raise RuntimeError(
                "step() found gradients that were not taken at a draw; "
                "run the forward and backward pass inside `with optimizer.sampled_params():`, "
                "or, in a Trainer, call attach(trainer) and give it no optimizers="
            )
        decision, self._report = self._judge(self._at_draw, self._squares(), self._numbers, self._report)
        self.stepping = True
        try:
            for buffers in all_buffers:
                if isinstance(decision, Tensor) or decision[0]:
                    self._update(buffers, decision)
                buffers.h_hat = None
        finally:
            self.stepping = False
        return loss

    def _update(self, buffers: Buffers, decision: StepDecision) -> None:
        """Apply lines 4 to 8 of the algorithm, unless the decision is that the step is skipped."""
        if buffers.h_hat is None:
            return
        group = buffers.group
        ess, clip, (beta1, beta2) = tempered_ess(group), group["clip"], group["betas"]
        if isinstance(decision, Tensor):  # on a device that decided for itself
            decision = decision.to(buffers.device, non_blocking=True)
        taken = buffers.with_gradient().there * decision[0]
        buffers.steps += taken
        debias = (buffers.steps * math.log(max(beta1, 1e-30))).expm1_().neg_()  # 1 − β1^t, for a small 1 − β1 as well
        # δ is from the m and σ of the last draw, which are those before the step.
        fixed, deltas = group["prior"] != "empirical", buffers.numels / buffers.moments  # the KL-optimal ones
        if fixed:
            deltas = torch.full_like(deltas, 1 / ess if group["prior"] == _GAUSSIAN else group["prior"])
        deltas = deltas * group["prior_strength"]
        memories = torch.full_like(deltas, 1 - beta2)
        if group["h0_steps"] is not None:
            memories = torch.maximum(memories, 1 / (buffers.steps + buffers.steps_before + group["h0_steps"]))
        adam = group["direction"] == "adam"
        if adam:
            known = buffers.per_loss > 0  # else all steps are taken to have been of as many losses as this one
            buffers.per_loss.copy_(torch.where(known, buffers.per_loss, buffers.seen / group["batch_size"]))
            buffers.unseen += taken * memories * (deltas - buffers.unseen)
            buffers.seen += taken * memories * (1 - buffers.seen)
            buffers.per_loss += taken * memories * (1 / group["batch_size"] - buffers.per_loss)
        lr = min(group["lr"], MAX_STEP)
        bound = min(clip, MAX_STEP / max(lr, 1.0))
        if group["rescale_lr"]:
            rates = (deltas + group["h0"]).clamp_(max=MAX_STEP / max(lr * bound, 1.0)).mul_(lr)
        else:
            rates = torch.full_like(deltas, lr)
        batch = float(group["batch_size"]) if group["hessian"] == "squared_gradients" else None
        terms = Terms(deltas, debias, rates, memories, buffers.unseen, buffers.losses)
        buffers.update(terms, decision, Constants(ess, beta1, bound, fixed, batch, adam))

    @torch.no_grad()
    def synchronize(self, average: Callable[[list[Tensor]], None]) -> None:
        """Average ĝ and ĥ over processes whose draws differ (`process` was set); call it before `step()`.

        ĝ is linear in what the processes see and ĥ = ĝ·(θ−m)/σ² is not, so each is averaged by itself.

        Args:
            average: puts the means over the processes into tensors, which are as many everywhere and alike in shape.
        """
        h_hats = (buffers.h_hat for buffers in self._get_buffers())
        average([*self._gradients(), *(h_hat for h_hat in h_hats if h_hat is not None)])
        self._at_draw = self._squares()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the Hessian estimates that were taken with them."""
        super().zero_grad(set_to_none)
        for buffers in self._buffers or ():
            buffers.h_hat = buffers.earlier = None

    @property
    def skipped(self) -> Skipped:
        """The steps that were skipped because their gradient was not finite, and where it was not."""
        total, in_a_row, number = map(int, self._report)
        # Beyond the last: the gradient of each is finite, and only their norm is not.
        names = [*chain.from_iterable(map(_names, self.param_groups)), "all tensors together"]
        return Skipped(total, in_a_row, names[number] if total else None)

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped because their gradient was not finite."""
        return self.skipped.total

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _squares(self) -> Tensor:
        """Return Σĝ² by tensor, in the order of the buffers."""
        return self._here([buffers.squares() for buffers in self._get_buffers()])

    def _here(self, values: list[Tensor]) -> Tensor:
        """Return values of all buffers on the device that decides, without waiting for another."""
        if len(values) == 1:
            return values[0]
        return torch.cat([value.to(self._home, non_blocking=self._home.type != "cpu") for value in values])

    def mean(self, param: Tensor) -> Tensor:
        """Return m of a parameter: float32, the parameter's shape, also while a draw is in the parameter."""
        return self._state_of(param)["mean"].clone()

    def sigma(self, param: Tensor) -> Tensor:
        """Return σ = 1/√(λ·p) of a parameter: float32, the parameter's shape, finite and positive."""
        return self._state_of(param)["precision"].mul(tempered_ess(self._group_of(param))).rsqrt_()

    def sigma_for_next_prior(self, param: Tensor) -> Tensor:
        """Return the σ that is saved of a parameter: float32, the parameter's shape, finite and positive.

        It is `sigma`, except with an earlier posterior as prior and κ > 1. Such a κ corrects for correlations that a
        diagonal Gaussian ignores, not for the amount of old data. So the saved σ² = 1/(λ·(p − δ + δ/κ)) counts the
        prior once; otherwise κ would multiply along a chain.
        """
        group, state = self._group_of(param), self._state_of(param)
        if group["prior"] != _GAUSSIAN or group["prior_strength"] <= 1:
            return self.sigma(param)
        ess = tempered_ess(group)
        once = state["prior_precision"] / ess
        known = (state["precision"] - group["prior_strength"] * once).clamp_(min=0)
        return (known + once).mul_(ess).rsqrt_()

    def prior_precision(self, param: Tensor) -> float | Tensor:
        """Return the prior precision s = λ·δ of the parameter's tensor (arXiv 2506.14280, Eq. 2).

        Where every weight has a prior of its own it is κ/σ₀²: float32, the parameter's shape.
        """
        group, state = self._group_of(param), self._state_of(param)
        if group["prior"] == _GAUSSIAN:
            return group["prior_strength"] * state["prior_precision"]
        return tempered_ess(group) * _delta(group, state["mean"], state["precision"])

    def summary(self) -> dict[str, float]:
        """Return figures of the posterior for a log, over all n weights.

        `ivon_sigma_mean`, `ivon_snr_mean`: the means of σ and of the signal-to-noise ratio |m|/σ.
        `ivon_log_sigma_spread`: the standard deviation of log σ within a tensor, averaged over tensors by their
        weights. It is 0 at the start, and stays near it where σ is not learned.
        `ivon_clipped_share`: the share of weights whose direction was at ±ξ in the last step, by the state that it
        left: |(g/(1−β1^t))/p| ≥ ξ, with a fixed prior |(g/(1−β1^t) + δ·m)/p| ≥ ξ.
        `ivon_kl`: KL(q‖prior) in nats, with the prior N(0, 1/s_i), s_i = λ·δ_i, of every tensor (arXiv 2506.14280,
        Eq. 1): ½·Σ_i [s_i·Σ_j(m_ij² + σ_ij²) − n_i − Σ_j log(s_i·σ_ij²)]. The first two terms cancel with the
        empirical prior. Left out for the fixed prior 0, which is no distribution. With a prior of
        every weight's own it is that to N(m₀, σ₀²/κ).
        `ivon_ess`: λ.
        """
        return summarize(self._get_buffers()) | {"ivon_ess": float(self.param_groups[0]["ess"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, as in `torch.optim`, with the state in float32.

        Where the state has a mean, the parameters are set to it: the next draw is around that, whatever they held.

        Raises:
            ValueError: if the groups or shapes differ from those of this optimizer, which then is as it was.
        """
        before = vars(self).copy()
        # torch would cast the state to the parameter's dtype, and a bfloat16 mean loses the small steps.
        super().load_state_dict({**state_dict, "state": {}})
        try:
            loaded = self._checked_state(state_dict)
        except ValueError:
            vars(self).update(before)
            raise
        for param, values in loaded:
            self.state[param] = values
            if "mean" in values:
                with torch.no_grad():
                    param.copy_(values["mean"])
        self._buffers = None

    def _checked_state(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return float32 copies of the state of each parameter that has one; raise ValueError if it does not fit."""
        loaded = []
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=True):
            saved = state_dict["state"].get(key)
            if saved is None:
                continue
            # Before its first draw an optimizer has a prior at most.
            names = [name for name in Buffers.names(self._group_of(param)) if "step" in saved or name in Buffers.PRIOR]
            if missing := [name for name in names if name not in saved]:
                raise ValueError(f"loaded state has no {missing[0]}")
            shapes = {name: tuple(saved[name].shape) for name in names}
            if set(shapes.values()) != {tuple(param.shape)}:
                raise ValueError(f"loaded state has shapes {shapes} for a parameter of {tuple(param.shape)}")
            copies = (torch.as_tensor(value).to(param.device, torch.float32, copy=True) for value in saved.values())
            loaded.append((param, dict(zip(saved, copies, strict=True))))
        return loaded

    @torch.no_grad()
    def adopt_parameters(self, sigma: Mapping[Tensor, Tensor] | None = None, steps: int = 0) -> None:
        """Let the mean be what the parameters hold, after somebody has put other weights into them.

        Args:
            sigma: the σ that was saved with these weights (`sigma_for_next_prior`), by the parameters, in their shapes;
                it stays where none is given. The momentum stays as well.
            steps: how many steps had learned that σ, for an optimizer that has taken none: else `h0_steps` would soon
                let it forget.
        """
        for buffers in self._get_buffers():
            buffers.adopt_parameters()
        for param, value in (sigma or {}).items():
            group, state = self._group_of(param), self.state[param]
            ess = tempered_ess(group)
            precision = (value.to(param.device).double().square() * ess).reciprocal()
            if group["prior"] == _GAUSSIAN and group["prior_strength"] > 1:
                precision += state["prior_precision"] * ((group["prior_strength"] - 1) / ess)
            state["precision"].copy_(precision.clamp_(PRECISION_FLOOR, PRECISION_CEILING))
            if "steps_before" in state and not state["step"]:
                state["steps_before"].fill_(steps)
            if "seen" in state:  # how much of it is older than the gradients is not known
                state["seen"].fill_(1)
                state["per_loss"].zero_()
                state["unseen"].fill_(_delta(group, state["mean"], state["precision"]))

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(param is candidate for candidate in group["params"]):
                return group
        raise ValueError(f"a tensor of shape {tuple(param.shape)} is not a parameter of this optimizer")

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        self._group_of(param)
        self._get_buffers()
        return self.state[param]

    @torch.no_grad()
    def _get_buffers(self) -> list[Buffers]:
        """Lay out the state of all parameters: take over the existing state and initialize the rest."""
        if self._buffers is None:
            # Not there until complete: a signal handler that saves may ask for σ meanwhile.
            all_buffers, numbers, number = list[Buffers](), list[int](), 0
            for index, group in enumerate(self.param_groups):
                homes: dict[tuple[torch.device, torch.dtype], list[int]] = {}
                for i, param in enumerate(group["params"]):
                    homes.setdefault((param.device, param.dtype), []).append(i)
                for place, members in enumerate(homes.values()):
                    params = [group["params"][i] for i in members]
                    chosen = kernels.choose(params)
                    all_buffers.append(Buffers(group, params, chosen, (index, place), self.state, _start))
                    numbers += [number + i for i in members]
                number += len(group["params"])
            # A GPU decides for itself whether a step is taken if all tensors are on GPUs, and their kernels can.
            judges = {buffers.kernels.judge for buffers in all_buffers}
            self._judge = judges.pop() if len(judges) == 1 else kernels.plain.judge
            on_device = all_buffers and self._judge is not kernels.plain.judge
            self._home = all_buffers[0].device if on_device else torch.device("cpu")
            self._at_draw = torch.zeros(len(numbers), device=self._home)  # Σĝ² by tensor when the last draw was over
            self._numbers = to_device(torch.tensor(numbers, dtype=torch.int64), self._home)
            self._buffers = all_buffers
        return self._buffers


# κ above it makes δ so large that float32 has nothing left for the data's part of p.
STRONGEST = 1e18


def without_numpy(value: Any) -> Any:
    """Return a number of NumPy's, alone or in a tuple, as one of Python's, and anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def _names(group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [f"tensor {i}" for i in range(len(group["params"]))]


def _delta(group: dict[str, Any], mean: Tensor, precision: Tensor) -> float:
    """Return δ of one tensor: the fixed one, or κ/(λ·mean(m² + σ²)), the KL-optimal one at κ = 1."""
    if group["prior"] != "empirical":
        return float(group["prior"] * group["prior_strength"])
    moments = float(tempered_ess(group) * mean.norm() ** 2 + precision.rsqrt().norm() ** 2)  # λ·Σ(m² + σ²)
    return min(group["prior_strength"] * mean.numel() / moments, PRECISION_CEILING)


def _start(group: dict[str, Any], mean: Tensor, prior_precision: Tensor | None) -> Tensor:
    """Return the p that a tensor starts with: h0 + δ, or that of the posterior that is its prior."""
    if prior_precision is not None:
        once = prior_precision * (max(1.0, group["prior_strength"]) / tempered_ess(group))
        return once.clamp_(PRECISION_FLOOR, PRECISION_CEILING)
    precision = torch.full_like(mean, group["h0"])
    return precision.add_(_delta(group, mean, precision)).clamp_(PRECISION_FLOOR, PRECISION_CEILING)


def _check_hyperparameters(group: dict[str, Any]) -> None:
    prior, betas, h0_steps, seed = (group[name] for name in ("prior", "betas", "h0_steps", "seed"))
    floor, ceiling = PRECISION_FLOOR, PRECISION_CEILING
    inf, hessians, directions = math.inf, ("reparameterized", "squared_gradients"), ("newton", "adam")
    checks = {
        "lr": (0 <= group["lr"] < inf, "finite and not negative"),
        "ess": (ESS_FLOOR <= group["ess"] <= ESS_CEILING, f"between {ESS_FLOOR:g} and {ESS_CEILING:g}"),
        "tau": (0 < group["tau"] < inf and ESS_FLOOR <= tempered_ess(group) <= ESS_CEILING, "positive, and λ·τ as λ"),
        "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        "h0": (floor <= group["h0"] <= ceiling, f"between {floor:g} and {ceiling:g}"),
        "clip": (group["clip"] > 0, "positive"),
        "prior_strength": (0 < group["prior_strength"] <= STRONGEST, f"positive, and {STRONGEST:g} at most"),
        "hessian": (group["hessian"] in hessians, " or ".join(f'"{name}"' for name in hessians)),
        "batch_size": (1 <= group["batch_size"] < inf, "1 or more"),
        "direction": (group["direction"] in directions, " or ".join(f'"{name}"' for name in directions)),
        "h0_steps": (h0_steps is None or 0 < h0_steps < inf, "None, or positive and finite"),
        "rescale_lr": (isinstance(group["rescale_lr"], bool), "True or False"),
        "seed": (isinstance(seed, int) and seed >= 0, "a whole number, not negative"),
    }
    if isinstance(prior, Mapping):
        own = "with a prior of every weight's own"
        checks["rescale_lr"] = (group["rescale_lr"] is False, f"False {own}")
    elif isinstance(prior, str):
        checks["prior"] = (prior == "empirical", '"empirical", a number or a mapping')
    else:
        checks["prior"] = (0 <= prior < inf, '"empirical", or finite and not negative')
    if group["direction"] == "adam":
        needed = {"hessian": "squared_gradients", "prior": "empirical", "rescale_lr": False}
        checks |= {name: (group[name] == value, f"{value!r} with adam's direction") for name, value in needed.items()}
    for name, (holds, must) in checks.items():
        if not holds:
            raise ValueError(f"{name} must be {must}, got {group[name]!r}")
