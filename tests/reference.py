"""IVON-LoRA in float64, one line a formula: what the fast optimizer is held against.

The algorithm of arXiv 2506.14280 (on IVON, arXiv 2402.17641) for one tensor, with the precision p = h + δ as
its state. The symbols are the paper's; nothing here is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class ReferenceIVON:
    """One tensor's m, g and p; `prior` is "empirical", the number δ, or (m₀, σ₀) of N(m₀, σ₀²/κ)."""

    m: np.ndarray
    lam: float
    beta1: float
    beta2: float
    h0: float
    clip: float
    prior: str | float | tuple[np.ndarray, np.ndarray] = "empirical"
    rescale_lr: bool = False
    prior_strength: float = 1.0
    hessian: str = "reparameterized"
    batch_size: int = 1
    h0_steps: float | None = None
    direction: str = "newton"
    t: int = 0
    g: np.ndarray = field(init=False)
    p: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)
    per_loss: float = field(init=False)
    debias: float = field(init=False)

    def __post_init__(self) -> None:
        self.m = np.asarray(self.m, dtype=np.float64)
        self.g = np.zeros_like(self.m)
        self.v, self.per_loss, self.debias = np.zeros_like(self.m), 0.0, 1.0  # E[B·ĝ²] and E[1/B], with p's memory
        self.p = np.full_like(self.m, self.h0)
        if isinstance(self.prior, tuple):  # yesterday's σ is where today begins
            self.p = max(1, self.prior_strength) / (self.lam * np.asarray(self.prior[1], dtype=np.float64) ** 2)
        else:
            self.p = self.h0 + self.delta()

    def sigma(self) -> np.ndarray:
        return 1 / np.sqrt(self.lam * self.p)

    def delta(self) -> float | np.ndarray:
        if isinstance(self.prior, tuple):
            return self.prior_strength / (self.lam * self.prior[1] ** 2)
        if self.prior != "empirical":
            return self.prior_strength * float(self.prior)
        return self.prior_strength / (self.lam * np.mean(self.m**2 + self.sigma() ** 2))

    def step(self, thetas: list[np.ndarray], gradients: list[np.ndarray], lr: float) -> None:
        """One step from the draws θ of its micro-batches and the gradients of loss / micro-batches there."""
        g_hat = sum(gradients)
        b1, b2 = self.beta1, self.beta2
        self.t += 1
        if self.h0_steps is not None:
            b2 = min(b2, 1 - 1 / (self.t + self.h0_steps))
        self.g = b1 * self.g + (1 - b1) * g_hat
        delta = self.delta()
        if self.hessian == "squared_gradients":
            self.p = b2 * self.p + (1 - b2) * (self.batch_size * sum(g**2 for g in gradients) + delta)
        else:
            h_hat = sum(g * (theta - self.m) / self.sigma() ** 2 for theta, g in zip(thetas, gradients, strict=True))
            f = h_hat + delta
            self.p = b2 * self.p + (1 - b2) * f + 0.5 * (1 - b2) ** 2 * (self.p - f) ** 2 / self.p
        m_0 = self.prior[0] if isinstance(self.prior, tuple) else 0.0
        weight_decay = 0.0 if self.prior == "empirical" else delta * (self.m - m_0)
        direction = (self.g / (1 - b1**self.t) + weight_decay) / self.p
        alpha = (self.h0 + delta) * lr if self.rescale_lr else lr
        if self.direction == "adam":
            self.v = b2 * self.v + (1 - b2) * self.batch_size * sum(g**2 for g in gradients)
            self.per_loss = b2 * self.per_loss + (1 - b2) / self.batch_size
            self.debias *= b2
            mean_square = self.v * self.per_loss / (1 - self.debias) ** 2
            direction = self.clip * self.g / (1 - b1**self.t) / np.sqrt(mean_square)
        self.m = self.m - alpha * np.clip(direction, -self.clip, self.clip)
