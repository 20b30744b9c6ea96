"""IVONLoRA: the variational optimizer of IVON-LoRA.

Sources: IVON-LoRA (arXiv 2506.14280), on IVON (arXiv 2402.17641, Algorithm 1). The posterior is
q = N(m, diag(σ²)) with σ² = 1/(λ·p), where p is the posterior precision over the effective sample size λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from .noise import mixed, random_bits, training_noise
from .parallel import in_parallel

# Bounds on p that keep σ = 1/√(λ·p) finite and positive in float32 for every λ that is accepted. The update
# keeps p positive; the floor is there for rounding, the ceiling for gradients whose square overflows.
PRECISION_FLOOR, PRECISION_CEILING = 1e-12, 1e24
# A step that is longer overflows sooner or later, whatever lr and clip allow.
TRAVEL = 1e18
# Weights that have noise of their own and are worked on at once on a CPU: few enough to stay in the cache from one
# operation to the next, and enough for the time that Python takes to call an operation not to count.
_PART = 2**17
# Weights from which on a CPU the seconds that it takes to compile the arithmetic are worth it.
_COMPILED = 2**18


class Skipped(NamedTuple):
    """The steps that were skipped because the norm of their gradient was not finite.

    `total` counts all of them and `in_a_row` the latest without a step between them; `tensor` is the first tensor, by
    its name where the optimizer was given names, whose gradient was not finite in the latest (None before any).
    """

    total: int
    in_a_row: int
    tensor: str | None


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


def _block_type(groups: list[dict[str, Any]]) -> Any:
    params = [param for group in groups for param in group["params"]]
    if len(groups) > 1 or {param.device.type for param in params} != {"cuda"}:
        return Block
    try:
        from .fused import FusedBlock, usable
    except ImportError:  # a build without Triton
        return Block
    return FusedBlock if usable(params) else Block


def _arithmetic(device: torch.device, weights: int) -> type[Arithmetic]:
    if device.type != "cpu" or weights < _COMPILED:
        return Arithmetic
    from .compiled import arithmetic

    return arithmetic() or Arithmetic


def _sigma(precision: Tensor, ess: float) -> Tensor:
    return precision.mul(ess).rsqrt_()


def _prior(group: dict[str, Any], mean: Tensor, precision: Tensor) -> float:
    """Return δ of one tensor: the fixed one, or 1/(λ·mean(m² + σ²)), the KL-optimal one."""
    if group["prior"] != "empirical":
        return float(group["prior"])
    # The paper's Eq. 2 is s = λ·δ; δ is what enters the update.
    return mean.numel() / float(group["ess"] * mean.norm() ** 2 + precision.rsqrt().norm() ** 2)


class Constants(NamedTuple):
    """The numbers in the update that are the same for all weights of a piece."""

    debias: float  # 1 − β1^t
    beta1: float
    beta2: float
    product: float  # what turns ĝ·(θ−m) into ĥ/p
    bound: float  # ξ
    lr: float
    fixed: bool  # whether the prior is a number, so that it acts on m as well


class Arithmetic:
    """The algorithm on the weights of a piece, in torch's operations."""

    PARTS = 1  # of _PART weights that make a piece

    @staticmethod
    def noise(noise: Tensor, sizes: list[int], seeds: np.ndarray) -> None:
        """Put ε ~ N(0, I) into `noise`, which has parts of these sizes, and seeds: uint64 [parts, 2]."""
        for part, (start, stride) in zip(noise.split_with_sizes(sizes), seeds, strict=True):
            training_noise(part.numpy(), start, stride)

    @staticmethod
    def draw(piece: Piece, noise: Tensor, ess: float) -> Tensor:
        """Put θ = m + σ·ε into the parameters; return the norms of m and of √λ·σ by tensor, for δ: [2, tensors]."""
        root = piece.precision.rsqrt()  # √λ·σ
        roots = piece.shaped(root)
        for theta, m, eps, r in zip(piece.thetas, piece.means, piece.shaped(noise), roots, strict=True):
            torch.addcmul(m, eps, r, value=ess**-0.5, out=theta)
        return torch.stack(torch._foreach_norm([*piece.means, *roots])).view(2, -1)

    @staticmethod
    def collect(piece: Piece, product: Tensor) -> None:
        """Note ĝ·(θ−m) in `product` and put the mean back."""
        thetas = piece.thetas
        for theta, mean, gradient, part in zip(
            thetas, piece.means, piece.gradients, piece.shaped(product), strict=True
        ):
            torch.sub(theta, mean, out=part).mul_(gradient)
        torch._foreach_copy_(thetas, piece.means)

    @staticmethod
    def gradient_norm(piece: Piece) -> float:
        """Return the norm of the gradients."""
        # float32 also for a float16 gradient, whose norm overflows early.
        return float(torch.stack(torch._foreach_norm(piece.gradients, dtype=torch.float32)).norm())

    @staticmethod
    def update(piece: Piece, product: Tensor, deltas: list[float], c: Constants) -> None:
        """Take one step, from ĝ in .grad and ĝ·(θ−m); `deltas` are δ by tensor."""
        m, g, p = piece.mean, piece.momentum, piece.precision
        torch._foreach_lerp_(piece.momenta, [gradient.float() for gradient in piece.gradients], 1 - c.beta1)
        # IVON's p ← β2·p + (1−β2)·(ĥ+δ) + ½(1−β2)²·(p−ĥ−δ)²/p is p·(1 + d + ½d²), positive for every d, where
        # d = (1−β2)·((ĥ+δ)/p − 1).
        d = p.reciprocal()
        minus_one = torch.full((), c.beta2 - 1, device=d.device)  # times 1−β2; no copy that a GPU waits for
        for part, delta in zip(piece.split(d), deltas, strict=True):
            torch.add(minus_one, part, alpha=(1 - c.beta2) * delta, out=part)
        d.add_(product, alpha=(1 - c.beta2) * c.product).nan_to_num_(nan=0.0, neginf=-TRAVEL)
        p.addcmul_(p, torch.addcmul(d, d, d, value=0.5)).clamp_(PRECISION_FLOOR, PRECISION_CEILING)
        # clip(x/(1−β1^t), ±ξ) = clip(x, ±ξ·(1−β1^t))/(1−β1^t)
        direction = torch.add(g, m, alpha=deltas[0] * c.debias).div_(p) if c.fixed else g / p
        m.sub_(direction.clamp_(-c.bound * c.debias, c.bound * c.debias), alpha=min(c.lr / c.debias, TRAVEL))
        torch._foreach_copy_(piece.thetas, piece.means)


class Piece:
    """Neighbouring weights of a block that are worked on at once: whole tensors, or some rows of large ones.

    `mean`, `momentum` and `precision` are its place in the block's buffers, `means` and `momenta` the same values in
    the shapes that they have in the parameters.
    """

    def __init__(self, block: Block, parts: Sequence[tuple[int, slice | None]]) -> None:
        self.key = block.key
        self.parts = parts  # number of the tensor, and its rows if not all
        self.params = block.params
        self.shapes = [theta.shape for theta in self.thetas]
        self.sizes = [shape.numel() for shape in self.shapes]
        i, rows = parts[0]
        start = block.offsets[i] + (rows.start * block.params[i][0].numel() if rows else 0)
        self.place = slice(start, start + sum(self.sizes))
        self.mean, self.momentum, self.precision = (getattr(block, name)[self.place] for name in block.FLATS)
        self.means, self.momenta = self.shaped(self.mean), self.shaped(self.momentum)
        self.norms = torch.zeros(2, 0)  # of m and of √λ·σ, tensor by tensor

    @cached_property
    def streams(self) -> np.ndarray:
        """What tells the noise of a part from that of others: uint64 [parts, 2]."""
        return np.stack([random_bits(f"{self.key}/{i}/{rows.start if rows else 0}") for i, rows in self.parts])

    @property
    def thetas(self) -> list[Tensor]:
        """What the parameters hold here."""
        return [self.params[i] if rows is None else self.params[i][rows] for i, rows in self.parts]

    @property
    def gradients(self) -> list[Tensor]:
        """Their gradients."""
        gradients: list[tuple[Any, slice | None]] = [(self.params[i].grad, rows) for i, rows in self.parts]
        return [gradient if rows is None else gradient[rows] for gradient, rows in gradients]

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """Part values of the piece by tensor."""
        return (flat,) if len(self.sizes) == 1 else flat.split_with_sizes(self.sizes)

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Part values of the piece by tensor, in the shapes that they have in the parameters."""
        return [part.view(shape) for part, shape in zip(self.split(flat), self.shapes, strict=True)]


class Block:
    """The state of a group's parameters on one device and of one dtype.

    m, g and p are one flat float32 buffer each, in which every tensor has its place; `optimizer.state` holds
    views of them. They are worked on in pieces: on a CPU small ones, in several threads; elsewhere the whole.
    """

    FLATS = ("mean", "momentum", "precision")
    fused = False

    def __init__(
        self, group: dict[str, Any], params: list[Tensor], state: dict[Tensor, Any], key: tuple[int, int]
    ) -> None:
        self.group, self.params, self.key = group, params, key
        self.device = params[0].device
        self.limit = float(_PART) if self.device.type == "cpu" else math.inf
        self.arithmetic = _arithmetic(self.device, sum(param.numel() for param in params))
        self.offsets = [0, *accumulate(param.numel() for param in params)]
        self.mean, self.momentum, self.precision = (
            torch.zeros(self.offsets[-1], device=self.device) for _ in self.FLATS
        )
        self.steps = torch.zeros(len(params))
        self.moments: dict[int, float] = {}  # λ·Σ(m² + σ²) of each tensor that was drawn last
        self.products: Tensor | None = None  # ĝ·(θ−m) = ĥ/(λ·p), summed over the draws since the last step
        self.earlier: list[Tensor | None] | None = None  # .grad of the draws before this one
        self._layout: tuple[float, ...] = ()
        self._pieces: list[Piece] = []

        for i, param in enumerate(params):
            views = {name: self.view(getattr(self, name), i) for name in self.FLATS}
            step = self.steps[i]
            if saved := state.get(param):
                for name, view in views.items():
                    view.copy_(saved[name])
                step.copy_(saved["step"])
            elif param.numel():
                views["mean"].copy_(param)
                views["precision"].fill_(group["h0"])
                views["precision"].add_(_prior(group, views["mean"], views["precision"]))
            state[param] = {**views, "step": step}

    def view(self, flat: Tensor, i: int) -> Tensor:
        return flat[self.offsets[i] : self.offsets[i + 1]].view(self.params[i].shape)

    def pieces(self, chosen: list[int], ages: Sequence[float] | None = None) -> list[Piece]:
        """Return the pieces that make up some tensors; the tensors of one piece are of the same age."""
        if not chosen:
            return []
        ages = ages or [0.0] * len(chosen)
        layout = (self.limit, *chosen, *(age - ages[0] for age in ages))
        if layout != self._layout:
            self._layout, self._pieces = layout, self._lay_out(chosen, ages)
        return self._pieces

    def _lay_out(self, chosen: list[int], ages: Sequence[float]) -> list[Piece]:
        pieces: list[list[tuple[int, slice | None]]] = []
        room, follows = 0.0, None
        for i, age in zip(chosen, ages, strict=True):
            for rows in self.parts(i):
                size = self.params[i][rows].numel() if rows else self.params[i].numel()
                if size <= room and follows in ((i, age), (i - 1, age)):
                    pieces[-1].append((i, rows))
                else:
                    pieces.append([(i, rows)])
                    room = self.limit * self.arithmetic.PARTS
                room, follows = room - size, (i, age)
        return [Piece(self, parts) for parts in pieces]

    def parts(self, i: int) -> list[slice | None]:
        """Return the rows that are the parts of a tensor, or None for all of a small one."""
        param = self.params[i]
        if param.numel() <= self.limit or not param.dim():
            return [None]
        rows = max(1, int(self.limit) * len(param) // param.numel())
        return [slice(first, first + rows) for first in range(0, len(param), rows)]

    def with_gradient(self) -> list[int]:
        return [i for i in self.moments if self.params[i].grad is not None]

    def draw(self, number: int | str) -> None:
        """θ = m + σ·ε, ε ~ N(0, I), and beside it what δ needs, for which σ is at hand."""
        ess, seed = self.group["ess"], self.noise_seed(number)

        def draw(piece: Piece) -> None:
            piece.norms = self.arithmetic.draw(piece, self.noise(piece, seed), ess)

        self.moments = {i: 0.0 for i, param in enumerate(self.params) if param.requires_grad and param.numel()}
        pieces = self.pieces(list(self.moments))
        in_parallel(draw, pieces)
        for piece in pieces:
            for (i, _), m, root in zip(piece.parts, *piece.norms.tolist(), strict=True):
                self.moments[i] += ess * m**2 + root**2

    def noise(self, piece: Piece, seed: np.ndarray) -> Tensor:
        noise = torch.empty(sum(piece.sizes), device=self.device)
        seeds = mixed(seed, piece.streams[:, :1], piece.streams[:, 1:])
        if self.device.type == "cpu":
            # Every tensor, or part of a large one, has noise of its own, however they are put into pieces.
            self.arithmetic.noise(noise, piece.sizes, seeds)
        else:
            noise.normal_(generator=torch.Generator(self.device).manual_seed(int(seeds[0, 0]) >> 1))
        return noise

    def noise_seed(self, number: int | str) -> np.ndarray:
        # A seed for each draw, and from it one for each part, not one long stream: two integers in the state are all
        # that a resumed run needs, on whatever device it goes on, and it does not matter which thread draws what.
        return random_bits(f"{self.group['seed']}/{number}")

    def restore_mean(self) -> None:
        def restore(piece: Piece) -> None:
            torch._foreach_copy_(piece.thetas, piece.means)

        in_parallel(restore, self.pieces(list(self.moments)))

    def set_gradients_aside(self) -> None:
        """Make room for the gradient of a draw, which ĥ needs apart from those of the draws before it."""
        self.earlier = None
        if self.products is not None:
            earlier = [param.grad for param in self.params]
            if all(gradient is None for gradient in earlier):
                self.products = None  # the gradients were dropped, so what was computed with them goes too
                return
            self.earlier = earlier
            for i, gradient in enumerate(earlier):
                self.params[i].grad = None
                if gradient is None:
                    self.view(self.products, i).zero_()

    def collect(self) -> None:
        """Put the mean back and note ĝ·(θ−m), added to that of earlier draws; .grad becomes the sum over the draws.

        It is all of ĥ = ĝ·(θ−m)/σ² = λ·p·ĝ·(θ−m) that must be kept, as p stays what it is until the step. θ is read
        from the parameters, so it is what the forward pass saw, after rounding to their dtype.
        """
        chosen = self.with_gradient()
        products = torch.zeros_like(self.mean) if len(chosen) < len(self.params) else torch.empty_like(self.mean)

        def collect(piece: Piece) -> None:
            self.arithmetic.collect(piece, products[piece.place])

        in_parallel(collect, self.pieces(chosen))
        if len(chosen) < len(self.moments):
            self.restore_mean()
        if self.products is not None:
            self.products += products
        elif chosen:
            self.products = products
        self.put_gradients_back(add=True)

    def forget_draw(self) -> None:
        """Take back what a draw that failed left behind."""
        self.put_gradients_back(add=False)

    def gradient_norm(self) -> float:
        pieces = self.pieces(self.with_gradient())
        norms = in_parallel(lambda piece: self.arithmetic.gradient_norm(piece), pieces)
        return math.hypot(*norms)

    def put_gradients_back(self, *, add: bool) -> None:
        for param, gradient in zip(self.params, self.earlier or [None] * len(self.params), strict=True):
            if not add:
                param.grad = gradient
            elif gradient is not None:
                param.grad = gradient if param.grad is None else gradient.add_(param.grad)
        self.earlier = None

    def update(self, scale: Any) -> None:
        """Apply one step of the algorithm to every tensor that has a gradient."""
        if self.products is None:
            return
        products, fixed = self.products, self.group["prior"] != "empirical"
        lr, ess, clip, (beta1, beta2) = (self.group[name] for name in ("lr", "ess", "clip", "betas"))
        chosen = self.with_gradient()
        self.steps[chosen] += 1
        steps = self.steps.tolist()

        def update(piece: Piece) -> None:
            indices = [i for i, _ in piece.parts]
            constants = Constants(
                debias=1 - beta1 ** steps[indices[0]],
                beta1=beta1,
                beta2=beta2,
                # ĥ/p = λ·ĝ·(θ−m), with ĝ scaled as the gradients were
                product=ess * min(scale, TRAVEL),
                bound=min(clip, TRAVEL / max(lr, 1.0)),
                lr=min(lr, TRAVEL),
                fixed=fixed,
            )
            self.arithmetic.update(piece, products[piece.place], [self.delta(i) for i in indices], constants)

        in_parallel(update, self.pieces(chosen, [steps[i] for i in chosen]))

    def delta(self, i: int) -> float:
        """δ of a tensor, from the m and σ of the last draw, which are those before the step."""
        prior = self.group["prior"]
        return self.params[i].numel() / self.moments[i] if prior == "empirical" else float(prior)


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
