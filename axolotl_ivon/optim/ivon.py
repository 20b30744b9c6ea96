"""IVONLoRA: the variational optimizer of IVON-LoRA.

Sources: IVON-LoRA (arXiv 2506.14280), on IVON (arXiv 2402.17641, Algorithm 1). The posterior is
q = N(m, diag(σ²)) with σ² = 1/(λ·p), where p is the posterior precision over the effective sample size λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..defaults import DEFAULTS
from .buffers import Block, _prior, _sigma
from .kernels import _block_type


class Skipped(NamedTuple):
    """The steps that were skipped because the norm of their gradient was not finite.

    `total` counts all of them and `in_a_row` the latest without a step between them; `tensor` is the first tensor, by
    its name where the optimizer was given names, whose gradient was not finite in the latest (None before any).
    """

    total: int
    in_a_row: int
    tensor: str | None


def effective_sample_size(n: int, gamma: float = DEFAULTS.gamma) -> float:
    """Return λ = γ·√N, the effective sample size of IVON-LoRA (arXiv 2506.14280, section 3).

    Args:
        n: number of training examples N.
        gamma: γ; the paper's value for commonsense reasoning is 5000.

    Raises:
        ValueError: if `n` or `gamma` is not positive.
    """
    if not n > 0:
        raise ValueError(f"n must be a positive number of training examples, got {n}")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    return gamma * math.sqrt(n)


class IVONLoRA(Optimizer):
    """Variational optimizer for LoRA weights: learns a mean m and a standard deviation σ for every weight.

    Run every forward and backward pass inside `sampled_params()`, which puts a draw θ = m + σ·ε into the
    parameters, and call `step()` outside of it. With gradient accumulation, enter it once for each
    micro-batch (with the loss divided by their number, as usual): each gets a draw of its own.

        with optimizer.sampled_params():
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Do not clip the gradients before `step()`: the Hessian estimate needs them as they are, and `clip` bounds
    the step instead.

    Args:
        params: what `torch.optim` takes: parameters, named parameters, or groups; a group may have its own
            value of anything below but `seed`. They may lie on several devices and be float32, bfloat16 or
            float16; the state is float32 throughout.
        lr: learning rate α. It is far larger than Adam's (1e-2 … 1e-1), since `clip` bounds the step.
        ess: effective sample size λ; see `effective_sample_size`.
        betas: β1 of the gradient's and β2 of the precision's running average.
        h0: initial Hessian.
        clip: ξ, bound on the preconditioned gradient of each weight; `math.inf` for none.
        prior: "empirical" for the KL-optimal prior of each tensor (arXiv 2506.14280, Eq. 2), or a number δ
            for IVON's fixed prior, which then acts as its weight decay.
        seed: seed of the draws. A draw depends on the seed, the number of draws before it and the place of
            the tensor alone, so a resumed run goes on with the draws that it would have had.

    Raises:
        ValueError: for a hyperparameter out of range, with its value.
    """

    def __init__(
        self,
        params: Any,
        lr: float = DEFAULTS.lr,
        *,
        ess: float,
        betas: tuple[float, float] = DEFAULTS.betas,
        h0: float = DEFAULTS.h0,
        clip: float = DEFAULTS.clip,
        prior: Literal["empirical"] | float = DEFAULTS.prior,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "ess": ess,
            "betas": betas,
            "h0": h0,
            "clip": clip,
            "prior": prior,
            "seed": seed,
            "draws": 0,
        }
        _check_hyperparameters(defaults)
        self._blocks: list[Block] | None = None
        self.process = 0  # number of the process, where each has draws of its own: see synchronize()
        self._drawn = False
        self._norm = 0.0  # of the gradients when the last draw was over
        self._not_finite: str | None = None  # the first tensor with a gradient that was not, at that moment
        self._skipped = Skipped(0, 0, None)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._blocks, self._drawn = None, False
        self.__dict__.setdefault("_skipped", Skipped(0, 0, None))
        self.__dict__.setdefault("process", 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in `torch.optim.Optimizer`."""
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                raise ValueError(f"IVONLoRA optimizes floating-point parameters, got {param.dtype}")
        self._forget_blocks()

    # ---------------------------------------------------------------- sampling

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
        blocks = self._get_blocks()
        self._drawn = True
        try:
            for group in self.param_groups:
                group["draws"] += 1
            for block in blocks:
                block.set_gradients_aside()
                draws = block.group["draws"]
                block.draw(f"{draws} of process {self.process}" if self.process else draws)
            yield
            first = all(block.products is None for block in blocks)
            for block in blocks:
                block.collect()
            # Once the norm was not finite it stays so until the next step, whatever the draws after it add.
            if (first or math.isfinite(self._norm)) and not any(block.fused for block in blocks):
                self._norm = self._gradient_norm()
                # Looked for now, as clipping code makes one gradient that is not finite into many.
                self._not_finite = None if math.isfinite(self._norm) else self._first_not_finite()
        except BaseException:
            for block in blocks:
                block.restore_mean()
                block.forget_draw()
            raise
        finally:
            self._drawn = False

    @contextmanager
    def evaluation_draw(self, number: int) -> Iterator[None]:
        """Put a draw θ ~ q into the parameters to evaluate it, and the mean back afterwards.

        Neither the gradients nor the draws of training are touched; the same number always gives the same noise.

        Raises:
            RuntimeError: if entered while a draw is in the parameters already.
        """
        if self._drawn:
            raise RuntimeError("evaluation_draw() was entered inside sampled_params()")
        blocks = self._get_blocks()
        self._drawn = True
        try:
            for block in blocks:
                block.draw(f"evaluation {number}")
            yield
        finally:
            for block in blocks:
                block.restore_mean()
            self._drawn = False

    @property
    def sampling(self) -> bool:
        """Whether the parameters hold a draw at this moment, and not the mean."""
        return self._drawn

    # ---------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update m, σ and the momentum from the gradients taken at the draws since the last step.

        If the gradient's norm is not finite the step is skipped: nothing changes, and `skipped` tells.

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
        blocks = self._get_blocks()
        if not self._gradients():
            return loss
        if not any(block.products is not None for block in blocks):
            raise RuntimeError(
                "step() found gradients that were not taken at a draw; "
                "run the forward and backward pass inside `with optimizer.sampled_params():`"
            )
        scale = self._judge(blocks)
        for block in blocks:
            if scale is not None:
                block.update(scale)
            block.products = None
        return loss

    @torch.no_grad()
    def synchronize(self, average: Callable[[list[Tensor]], None]) -> None:
        """Average ĝ and ĥ over processes whose draws differ (`process` was set); call it before `step()`.

        ĝ is linear in what the processes see and ĥ = ĝ·(θ−m)/σ² is not, so each is averaged by itself.

        Args:
            average: puts the means over the processes into tensors, which are as many everywhere and alike in shape.
        """
        blocks = self._get_blocks()
        average([*self._gradients(), *(block.products for block in blocks if block.products is not None)])
        if any(block.fused for block in blocks):
            blocks[0].measure()  # type: ignore[attr-defined]
        else:
            self._norm = self._gradient_norm()
            self._not_finite = None if math.isfinite(self._norm) else self._first_not_finite()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the Hessian estimates that were taken with them."""
        super().zero_grad(set_to_none)
        for block in self._blocks or ():
            block.products = None
            block.earlier = None

    @property
    def skipped(self) -> Skipped:
        """The steps that were skipped because their gradient was not finite, and where it was not."""
        skipped = self._skipped
        for block in self._blocks or ():
            if block.fused:
                total, in_a_row, tensor = block.skipped  # type: ignore[attr-defined]
                earlier = skipped.in_a_row if in_a_row == total else 0
                name = self._name(tensor) if total else skipped.tensor
                skipped = Skipped(skipped.total + total, earlier + in_a_row, name)
        return skipped

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped because their gradient was not finite."""
        return self.skipped.total

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _gradient_norm(self) -> float:
        return math.hypot(*(block.gradient_norm() for block in self._get_blocks()))

    def _judge(self, blocks: list[Block]) -> float | Tensor | None:
        """Return by what the gradients were scaled since the draws, or None if the step is to be skipped.

        What scales .grad after the backward pass, a loss scaler or a clipped norm, scales ĥ alike.
        """
        if any(block.fused for block in blocks):
            return blocks[0].judge()  # type: ignore[attr-defined]
        norm = self._gradient_norm()
        if math.isfinite(norm + self._norm):
            self._skipped = self._skipped._replace(in_a_row=0)
            return norm / self._norm if self._norm > 0 else 1.0
        total, in_a_row, _ = self._skipped
        self._skipped = Skipped(total + 1, in_a_row + 1, self._not_finite or self._first_not_finite())
        return None

    def _first_not_finite(self) -> str:
        finite = [p.grad is None or bool(p.grad.isfinite().all()) for g in self.param_groups for p in g["params"]]
        return self._name([*finite, False].index(False))

    def _name(self, number: int) -> str:
        for group in self.param_groups:
            if number < len(group["params"]):
                return group["param_names"][number] if "param_names" in group else f"tensor {number}"
            number -= len(group["params"])
        return "all tensors together"  # that of each is finite, and only their norm is not

    def _forget_blocks(self) -> None:
        self._skipped, self._blocks = self.skipped, None

    # ---------------------------------------------------------------- the posterior

    def mean(self, param: Tensor) -> Tensor:
        """Return m of a parameter: float32, the parameter's shape, also while a draw is in the parameter."""
        return self._state_of(param)["mean"].clone()

    def sigma(self, param: Tensor) -> Tensor:
        """Return σ = 1/√(λ·p) of a parameter: float32, the parameter's shape, finite and positive."""
        group = self._group_of(param)
        return _sigma(self._state_of(param)["precision"], group["ess"])

    def prior_precision(self, param: Tensor) -> float:
        """Return the prior precision s = λ·δ of the parameter's tensor (arXiv 2506.14280, Eq. 2)."""
        group, state = self._group_of(param), self._state_of(param)
        return float(group["ess"] * _prior(group, state["mean"], state["precision"]))

    def summary(self) -> dict[str, float]:
        """Return the mean σ and the mean signal-to-noise ratio |m|/σ over all weights, and λ."""
        totals = torch.zeros(2, dtype=torch.float64)
        count = 0
        for block in self._get_blocks():
            sigma = _sigma(block.precision, block.group["ess"])
            totals[0] += sigma.mean(dtype=torch.float64).cpu() * sigma.numel()
            totals[1] += (block.mean.abs() / sigma).mean(dtype=torch.float64).cpu() * sigma.numel()
            count += sigma.numel()
        return {
            "ivon_sigma_mean": float(totals[0] / max(count, 1)),
            "ivon_snr_mean": float(totals[1] / max(count, 1)),
            "ivon_ess": float(self.param_groups[0]["ess"]),
        }

    # ---------------------------------------------------------------- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, as in `torch.optim`, with the state in float32.

        Raises:
            ValueError: if the groups or shapes differ from those of this optimizer.
        """
        # torch would cast the state to the parameter's dtype, and a bfloat16 mean loses the small steps.
        super().load_state_dict({**state_dict, "state": {}})
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=True):
            saved = state_dict["state"].get(key)
            if saved is None:
                continue
            shapes = {name: tuple(saved[name].shape) for name in Block.FLATS}
            if set(shapes.values()) != {tuple(param.shape)}:
                raise ValueError(f"loaded state has shapes {shapes} for a parameter of {tuple(param.shape)}")
            self.state[param] = {
                name: torch.as_tensor(value).to(param.device, torch.float32, copy=True) for name, value in saved.items()
            }
        self._forget_blocks()

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(param is candidate for candidate in group["params"]):
                return group
        raise ValueError(f"a tensor of shape {tuple(param.shape)} is not a parameter of this optimizer")

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        self._group_of(param)
        self._get_blocks()
        return self.state[param]

    @torch.no_grad()
    def _get_blocks(self) -> list[Block]:
        """Lay the state of all parameters out, taking over what state there is and initializing the rest."""
        if self._blocks is None:
            # Not there until complete: a signal handler that saves may ask for σ meanwhile.
            blocks, make = list[Block](), _block_type(self.param_groups)
            for index, group in enumerate(self.param_groups):
                homes: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
                for param in group["params"]:
                    homes.setdefault((param.device, param.dtype), []).append(param)
                for number, params in enumerate(homes.values()):
                    blocks.append(make(group, params, self.state, key=(index, number)))
            self._blocks = blocks
        return self._blocks


def _check_hyperparameters(group: dict[str, Any]) -> None:
    def check(name: str, value: Any, ok: bool, must: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {must}, got {value!r}")

    lr, ess, betas, h0, clip = (group[name] for name in ("lr", "ess", "betas", "h0", "clip"))
    prior, seed = group["prior"], group["seed"]
    check("lr", lr, 0 <= lr < math.inf, "finite and not negative")
    check("ess", ess, 1e-8 <= ess <= 1e12, "between 1e-8 and 1e12")
    check("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
    check("h0", h0, 0 < h0 < math.inf, "positive and finite")
    check("clip", clip, clip > 0, "positive")
    if isinstance(prior, str):
        check("prior", prior, prior == "empirical", '"empirical" or a number')
    else:
        check("prior", prior, 0 <= prior < math.inf, '"empirical", or finite and not negative')
    check("seed", seed, isinstance(seed, int) and seed >= 0, "a whole number, not negative")
