"""IVONLoRA: the variational optimizer of IVON-LoRA.

Sources: IVON-LoRA (arXiv 2506.14280), on IVON (arXiv 2402.17641, Algorithm 1). The posterior is
q = N(m, diag(σ²)) with σ² = 1/(λ·p), where p is the posterior precision over the effective sample size λ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

# Bounds on p that keep σ = 1/√(λ·p) finite and positive in float32 for every λ that is accepted. The update
# keeps p positive; the floor is there for rounding, the ceiling for gradients whose square overflows.
PRECISION_FLOOR, PRECISION_CEILING = 1e-12, 1e24
# A gradient sample of the Hessian beyond this would overflow when samples are added.
_HESSIAN_LIMIT = 1e30


def effective_sample_size(n: int, gamma: float = 5000.0) -> float:
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
        lr: float = 1e-2,
        *,
        ess: float,
        betas: tuple[float, float] = (0.9, 0.9995),
        h0: float = 5e-2,
        clip: float = 5e-3,
        prior: Literal["empirical"] | float = "empirical",
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
        self._blocks: list[_Block] | None = None
        self._drawn = False
        self.skipped_steps = 0
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._blocks, self._drawn = None, False
        self.__dict__.setdefault("skipped_steps", 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in `torch.optim.Optimizer`."""
        _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                raise ValueError(f"IVONLoRA optimizes floating-point parameters, got {param.dtype}")
        self._blocks = None

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
                block.draw(block.group["draws"])
            yield
        except BaseException:
            for block in blocks:
                block.restore_mean()
                block.forget_draw()
            self._drawn = False
            raise
        for block in blocks:
            block.restore_mean()
        self._drawn = False
        for block in blocks:
            block.collect()
        self._note_gradient_norm()

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
                block.deviation = None
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

        If the gradient's norm is not finite the step is skipped: nothing changes and `skipped_steps` goes up by one.

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
        gradients = self._gradients()
        if not gradients:
            return loss
        if not any(block.hessian is not None for block in blocks):
            raise RuntimeError(
                "step() found gradients that were not taken at a draw; "
                "run the forward and backward pass inside `with optimizer.sampled_params():`"
            )
        norm = get_total_norm(gradients)
        if torch.isfinite(norm):
            # What scaled .grad since the backward pass (a loss scaler, a clipped norm) scales ĥ alike.
            scale = torch.where(self._norm > 0, norm / self._norm, 1.0)
            for block in blocks:
                block.update(scale.to(block.device))
        else:
            self.skipped_steps += 1
        for block in blocks:
            block.hessian = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the Hessian estimates that were taken with them."""
        super().zero_grad(set_to_none)
        for block in self._blocks or ():
            block.hessian = None
            block.earlier = None

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def _note_gradient_norm(self) -> None:
        gradients = self._gradients()
        if gradients:
            self._norm = get_total_norm(gradients)

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
            shapes = {name: tuple(saved[name].shape) for name in _Block.FLATS}
            if set(shapes.values()) != {tuple(param.shape)}:
                raise ValueError(f"loaded state has shapes {shapes} for a parameter of {tuple(param.shape)}")
            self.state[param] = {
                name: torch.as_tensor(value).to(param.device, torch.float32, copy=True) for name, value in saved.items()
            }
        self._blocks = None

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
    def _get_blocks(self) -> list[_Block]:
        """Lay the state of all parameters out, taking over what state there is and initializing the rest."""
        if self._blocks is None:
            self._blocks = []
            for index, group in enumerate(self.param_groups):
                homes: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
                for param in group["params"]:
                    homes.setdefault((param.device, param.dtype), []).append(param)
                for number, params in enumerate(homes.values()):
                    self._blocks.append(_Block(group, params, self.state, key=(index, number)))
        return self._blocks


def _prior(group: dict[str, Any], mean: Tensor, precision: Tensor) -> Tensor:
    """Return δ of one tensor: the fixed one, or 1/(λ·mean(m² + σ²)), the KL-optimal one."""
    if group["prior"] != "empirical":
        return torch.as_tensor(float(group["prior"]), dtype=torch.float32, device=mean.device)
    # λ·mean(m² + σ²) = λ·mean(m²) + mean(1/p); the paper's Eq. 2 is s = λ·δ, and δ is what enters the update.
    flat = mean.reshape(-1)
    return 1 / (group["ess"] / flat.numel() * flat.dot(flat) + precision.reciprocal().mean())


def _sigma(precision: Tensor, ess: float) -> Tensor:
    return precision.mul(ess).rsqrt_()


class _Block:
    """The state of a group's parameters on one device and of one dtype.

    m, g and p are one flat float32 buffer each, in which every tensor has its place; `optimizer.state` holds
    views of them. They are worked on in pieces: on a CPU a piece is one tensor, so that what is read stays in
    the cache; elsewhere it is the whole buffer, so that no launch is made for each tensor.
    """

    FLATS = ("mean", "momentum", "precision")

    def __init__(
        self, group: dict[str, Any], params: list[Tensor], state: dict[Tensor, Any], key: tuple[int, int]
    ) -> None:
        self.group, self.params, self.key = group, params, key
        self.device, self.dtype = params[0].device, params[0].dtype
        self.whole = self.device.type != "cpu"
        self.sizes = [param.numel() for param in params]
        self.offsets = [0, *accumulate(self.sizes)]
        self.lengths = torch.tensor(self.sizes, device=self.device)
        self.generator = torch.Generator(self.device)
        self.mean, self.momentum, self.precision = (
            torch.zeros(self.offsets[-1], device=self.device) for _ in self.FLATS
        )
        self.steps = torch.zeros(len(params), device=self.device)
        self.deviation: Tensor | None = None  # θ−m of a draw
        self.hessian: Tensor | None = None  # ĥ, summed over the draws since the last step
        self.earlier: list[Tensor | None] | None = None  # .grad of the draws before this one

        for i, param in enumerate(params):
            views = {name: self.view(getattr(self, name), i) for name in self.FLATS}
            step = self.steps[i]
            if saved := state.get(param):
                for name, view in views.items():
                    view.copy_(saved[name])
                step.copy_(saved["step"])
            else:
                views["mean"].copy_(param)
                views["precision"].fill_(group["h0"])
                views["precision"].add_(_prior(group, views["mean"], views["precision"]))
            state[param] = {**views, "step": step}

    def view(self, flat: Tensor, i: int) -> Tensor:
        return flat[self.offsets[i] : self.offsets[i + 1]].view(self.params[i].shape)

    def pieces(self, chosen: list[int]) -> Iterator[tuple[list[int], slice]]:
        """Yield what is worked on at once: indices of tensors, and their place in the flat buffers."""
        if self.whole and len(chosen) == len(self.params):
            yield chosen, slice(None)
        else:
            for i in chosen:
                yield [i], slice(self.offsets[i], self.offsets[i + 1])

    def with_gradient(self) -> list[int]:
        return [i for i, param in enumerate(self.params) if param.grad is not None]

    def write(self, indices: list[int], flat: Tensor) -> None:
        """Copy from a flat buffer into parameters, in their dtype."""
        torch._foreach_copy_([self.params[i] for i in indices], [self.view(flat, i) for i in indices])

    def gradient(self, indices: list[int]) -> Tensor:
        """Return the gradients of some parameters as one flat float32 tensor."""
        parts = [self.params[i].grad.reshape(-1) for i in indices]  # type: ignore[union-attr]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()

    @torch.no_grad()
    def draw(self, number: int | str) -> None:
        """θ = m + σ·ε, ε ~ N(0, I)."""
        self.deviation = torch.empty_like(self.mean)
        for indices, place in self.pieces([i for i, param in enumerate(self.params) if param.requires_grad]):
            theta, mean = self.deviation[place], self.mean[place]
            theta.normal_(generator=self.generator.manual_seed(self.noise_seed(number, indices[0])))
            theta.mul_(_sigma(self.precision[place], self.group["ess"])).add_(mean)
            if self.dtype != torch.float32:
                theta.copy_(theta.to(self.dtype))  # ε is what the forward pass really sees
            self.write(indices, self.deviation)
            theta.sub_(mean)

    def noise_seed(self, number: int | str, index: int) -> int:
        # A seed for each draw and piece, not one long stream: two integers in the state are all that a
        # resumed run needs, on whatever device it goes on.
        text = f"{self.group['seed']}/{number}/{self.key}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    @torch.no_grad()
    def restore_mean(self) -> None:
        self.write([i for i, param in enumerate(self.params) if param.requires_grad], self.mean)

    def set_gradients_aside(self) -> None:
        """Make room for the gradient of a draw, which ĥ needs apart from those of the draws before it."""
        self.earlier = None
        if self.hessian is not None:
            earlier = [param.grad for param in self.params]
            if all(gradient is None for gradient in earlier):
                self.hessian = None  # the gradients were dropped, so what was computed with them goes too
                return
            self.earlier = earlier
            for i, gradient in enumerate(earlier):
                self.params[i].grad = None
                if gradient is None:
                    self.view(self.hessian, i).zero_()

    @torch.no_grad()
    def collect(self) -> None:
        """ĥ = ĝ·(θ−m)/σ², added to that of earlier draws; .grad becomes the sum over the draws."""
        assert self.deviation is not None
        hessian, self.deviation = self.deviation, None
        chosen = self.with_gradient()
        for indices, place in self.pieces(chosen):
            sample = hessian[place].mul_(self.gradient(indices)).mul_(self.precision[place])
            sample.mul_(self.group["ess"]).clamp_(-_HESSIAN_LIMIT, _HESSIAN_LIMIT)
        for i in set(range(len(self.params))).difference(chosen):
            self.view(hessian, i).zero_()
        if self.hessian is not None:
            self.hessian += hessian
        elif chosen:
            self.hessian = hessian
        self.put_gradients_back(add=True)

    def forget_draw(self) -> None:
        """Take back what a draw that failed left behind."""
        self.deviation = None
        self.put_gradients_back(add=False)

    def put_gradients_back(self, *, add: bool) -> None:
        for param, gradient in zip(self.params, self.earlier or [None] * len(self.params), strict=True):
            if not add:
                param.grad = gradient
            elif gradient is not None:
                param.grad = gradient if param.grad is None else gradient.add_(param.grad)
        self.earlier = None

    def update(self, scale: Tensor) -> None:
        """Apply one step of the algorithm to every tensor that has a gradient."""
        if self.hessian is None:
            return
        group = self.group
        lr, clip, (beta1, beta2) = group["lr"], group["clip"], group["betas"]
        for indices, place in self.pieces(self.with_gradient()):
            m, g, p = self.mean[place], self.momentum[place], self.precision[place]
            h = self.hessian[place].mul_(scale)
            steps = self.steps[indices[0] : indices[-1] + 1].add_(1)

            g.lerp_(self.gradient(indices), 1 - beta1)
            delta = self.spread(self.prior(m, p, indices), indices)
            # IVON's p ← β2·p + (1−β2)·(ĥ+δ) + ½(1−β2)²·(p−ĥ−δ)²/p is p·(1 + d + ½d²), positive for every d.
            d = h.add_(delta).sub_(p).div_(p).mul_(1 - beta2)
            p.addcmul_(p, d.mul(0.5).add_(1).mul_(d)).clamp_(PRECISION_FLOOR, PRECISION_CEILING)
            direction = g / self.spread(1 - beta1**steps, indices)
            if group["prior"] != "empirical":
                direction.addcmul_(delta, m)
            m.sub_(direction.div_(p).clamp_(-clip, clip), alpha=lr)
            self.write(indices, self.mean)

    def prior(self, mean: Tensor, precision: Tensor, indices: list[int]) -> Tensor:
        """Return δ of each tensor of a piece."""
        if len(indices) == 1 or self.group["prior"] != "empirical":
            return _prior(self.group, mean, precision)
        second_moment = mean.square().mul_(self.group["ess"]).add_(precision.reciprocal())
        return 1 / torch.segment_reduce(second_moment, "mean", lengths=self.lengths, unsafe=True)

    def spread(self, values: Tensor, indices: list[int]) -> Tensor:
        """Give every weight of a piece the value of its tensor."""
        if len(indices) == 1 or values.dim() == 0:
            return values
        return values.repeat_interleave(self.lengths, output_size=self.offsets[-1])


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
