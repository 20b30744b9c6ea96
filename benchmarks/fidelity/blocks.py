"""IVON with a matrix over the rank in place of a number a weight: does a LoRA pair's own freedom matter?

B·A is the same as (B·R)·(R⁻¹·A), so the weights of a column of A, and of a row of B, are correlated in the posterior.
Here each of them has a precision P of rank × rank in place of its diagonal, at `rank` times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from axolotl_ivon import Posterior


def to_blocks(value: Tensor) -> Tensor:
    """Return a LoRA matrix (rank, inputs) or (outputs, rank) as (inputs or outputs, rank)."""
    return value.T if value.shape[0] <= value.shape[1] else value


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo `to_blocks` for a matrix of the shape of `like`."""
    return blocks.T if like.shape[0] <= like.shape[1] else blocks


class Correlated(Posterior):
    """A Gaussian whose weights are correlated over the rank: θ = m + root·ε, block by block.

    `roots` are (blocks, rank, rank), by the names of the mean.
    """

    roots: Mapping[str, Tensor]

    def sample(self, seed: int = 0, member: int = 0) -> dict[str, Tensor]:
        """Return one draw, float32; the same for the same seed and member."""
        found = {}
        for number, (name, mean) in enumerate(dict(self.mean).items()):
            generator = torch.Generator().manual_seed(hash((seed, member, number)) % 2**63)
            root = self.roots[name]
            noise = root @ torch.randn(*root.shape[:2], 1, generator=generator)
            found[name] = mean + from_blocks(noise.squeeze(-1), mean)
        return found


def correlated(mean: Mapping[str, Tensor], roots: Mapping[str, Tensor]) -> Correlated:
    """Return the posterior of these means and roots of the covariance; σ is the square root of its diagonal."""
    sigma = {name: from_blocks(root.square().sum(-1).sqrt(), mean[name]) for name, root in roots.items()}
    found = Correlated(dict(mean), {name: value.contiguous() for name, value in sigma.items()}, {}, {})
    vars(found)["roots"] = roots  # it is frozen
    return found


class BlockIVON(torch.optim.Optimizer):
    """`IVONLoRA(hessian="squared_gradients")` with P of rank × rank for each column of A and row of B.

    With the prior δ·I of a tensor at the KL-optimal δ = κ/(λ·mean(m² + diag(P⁻¹)/λ)), and a draw of N(m, (λP)⁻¹):

        P ← P + ρ·(B·ĝĝᵀ + δ·I − P),   m ← m − α·clip(P⁻¹·ḡ, ±ξ)

    With rank 1 it is the diagonal one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        ess: float,
        beta2: float,
        h0: float,
        clip: float,
        prior_strength: float,
        h0_steps: float,
        seed: int,
        beta1: float = 0.9,
    ) -> None:
        super().__init__(list(parameters.values()), {"lr": lr, "batch_size": 1})
        self.ess, self.betas, self.clip, self.h0_steps = ess, (beta1, beta2), clip, h0_steps
        self.strength, self.generator, self.steps = prior_strength, torch.Generator().manual_seed(seed), 0
        self.parameters = dict(parameters)
        parts = [to_blocks(value.detach().float()) for value in parameters.values()]
        self.sizes = [len(part) for part in parts]
        self.m = torch.cat(parts)
        self.g = torch.zeros_like(self.m)
        rank = self.m.shape[1]
        self.P = h0 * torch.eye(rank) + self._delta(torch.full_like(self.m, 1 / (ess * h0)))
        self.root = torch.linalg.cholesky(self.P)

    def _delta(self, variance: Tensor) -> Tensor:
        """Return δ·I of every block, from σ² of every weight."""
        second = (self.m.square() + variance).split(self.sizes)
        each = [torch.full((len(part),), self.strength / (self.ess * float(part.mean()))) for part in second]
        return torch.cat(each)[:, None, None] * torch.eye(self.m.shape[1])

    def roots(self) -> Tensor:
        """Return L⁻ᵀ/√λ of P = L·Lᵀ, (blocks, rank, rank): a root of the covariance (λP)⁻¹."""
        identity = torch.eye(self.m.shape[1]).expand_as(self.root)
        return torch.linalg.solve_triangular(self.root.mT, identity, upper=True) / self.ess**0.5

    @torch.no_grad()
    def _put(self, blocks: Tensor) -> None:
        for part, value in zip(blocks.split(self.sizes), self.parameters.values(), strict=True):
            value.copy_(from_blocks(part, value))

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """Hold a draw inside the context, and the mean outside."""
        noise = torch.randn(*self.m.shape, 1, generator=self.generator)
        drawn = torch.linalg.solve_triangular(self.root.mT, noise, upper=True).squeeze(-1) / self.ess**0.5
        self._put(self.m + drawn)
        try:
            yield
        finally:
            self._put(self.m)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step from the gradients at the draws."""
        self.steps += 1
        [group] = self.param_groups
        beta1, beta2 = self.betas
        g = torch.cat([to_blocks(value.grad) for value in self.parameters.values()])  # type: ignore[arg-type]
        inverse = torch.cholesky_inverse(self.root)
        delta = self._delta(inverse.diagonal(dim1=-2, dim2=-1) / self.ess)
        rho = max(1 - beta2, 1 / (self.steps + self.h0_steps))
        self.P = self.P + rho * (group["batch_size"] * g[:, :, None] * g[:, None, :] + delta - self.P)
        self.root = torch.linalg.cholesky(self.P)
        self.g = beta1 * self.g + (1 - beta1) * g
        direction = torch.cholesky_solve(self.g[..., None] / (1 - beta1**self.steps), self.root).squeeze(-1)
        self.m = self.m - group["lr"] * direction.clamp(-self.clip, self.clip)
        self._put(self.m)

    def posterior(self) -> Correlated:
        """Return the posterior, by the names of the parameters."""
        parts = zip(self.parameters.items(), self.m.split(self.sizes), self.roots().split(self.sizes), strict=True)
        means, roots = dict[str, Tensor](), dict[str, Tensor]()
        for (name, value), mean, root in parts:
            means[name], roots[name] = from_blocks(mean, value).contiguous(), root.contiguous()
        return correlated(means, roots)
