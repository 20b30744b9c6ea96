"""The distance of two posteriors, module by module."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import IVONError
from ..posterior.adapter import different_shapes, modules
from ..posterior.chain import meaning
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter


def distance(first: Posterior, second: Posterior, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Return the distance of two posteriors over the same tensors, overall and per module, as plain numbers.

    For q_a = N(m_a, σ_a²) and q_b:
      kl_ab, kl_ba  KL(q_a‖q_b) = Σ ln(σ_b/σ_a) + (σ_a² + (m_a − m_b)²)/(2σ_b²) − ½, and the other way, in nats,
                    over the weights that have σ > 0 in both (it is infinite for the others);
      one_sided     the share of weights with σ > 0 in one of the two only, as after pruning one;
      cosine        of the means (None if one of them is 0);
      apart         the share of weights with |m_a − m_b| > √(σ_a² + σ_b²).

    Raises:
        IVONError: the posteriors have different tensors.
    """
    for key, *shapes in different_shapes(first.mean, second.mean):
        a, b = ("none such" if shape is None else f"shape {shape}" for shape in shapes)
        fix = "only adapters of the same modules and rank have a distance"
        raise IVONError(f"the adapters differ in {key}: A has {a}, B has {b}; {fix}")
    tokens = [meaning(q.config)["trainable_token_indices"] for q in (first, second)]
    if tokens[0] != tokens[1]:
        raise IVONError(f"the adapters trained different tokens: trainable_token_indices {tokens[0]} and {tokens[1]}")
    sums = first.mean.each(lambda key: _sums(first, second, key), "comparing", reporter)
    rows = [
        {"module": name, **_distance(np.sum([sums[key] for key in keys], axis=0))}
        for name, keys in modules(first.mean).items()
    ]
    return {**_distance(np.sum(list(sums.values()), axis=0)), "modules": rows}


def _sums(first: Posterior, second: Posterior, key: str) -> np.ndarray:
    """Return the terms that add up over tensors: weights, KL both ways, one-sided, apart, three products of means."""
    a, b = (q.mean.float32(key).reshape(-1).astype(np.float64) for q in (first, second))
    s, t = (q.sigma.raw(key).reshape(-1).astype(np.float64) for q in (first, second))
    products = [a @ b, a @ a, b @ b]
    apart = np.count_nonzero((a - b) ** 2 > s**2 + t**2)
    both = (s > 0) & (t > 0)
    one_sided = np.count_nonzero((s > 0) != (t > 0))
    a, b, s, t = a[both], b[both], s[both], t[both]
    logs = np.log(t / s)
    gap = (a - b) ** 2
    kl_ab = logs + (s**2 + gap) / (2 * t**2) - 0.5
    kl_ba = -logs + (t**2 + gap) / (2 * s**2) - 0.5
    return np.array([first.mean.size(key), kl_ab.sum(), kl_ba.sum(), one_sided, apart, *products])


def _distance(sums: np.ndarray) -> dict[str, Any]:
    weights, kl_ab, kl_ba, one_sided, apart, ab, aa, bb = (float(x) for x in sums)
    return {
        "weights": int(weights),
        "kl_ab": kl_ab,
        "kl_ba": kl_ba,
        "cosine": ab / math.sqrt(aa * bb) if aa * bb > 0 else None,
        "apart": apart / max(weights, 1),
        "one_sided": one_sided / max(weights, 1),
    }
