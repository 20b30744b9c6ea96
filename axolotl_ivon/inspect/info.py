"""Describe an adapter folder in numbers: quantiles of σ and of the signal-to-noise ratio, per module and overall."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np

from ..posterior.adapter import Adapter, modules
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# A bin is a positive float32 without its last 14 bits. It is at most 0.2 % wide, and so is the error of a quantile.
_SHIFT = 14
_BINS = 2 ** (31 - _SHIFT)
_LARGEST = np.finfo(np.float32).max
# The decades that the histogram of the signal-to-noise ratio shows, in halves; outliers go to the ends.
_EDGES = tuple(round(x / 2, 1) for x in range(-6, 7))


def describe(
    path_or_hub_id: str | os.PathLike[str], ratio: float = 0.1, criterion: str = "snr", reporter: Reporter = SILENT
) -> dict[str, Any]:
    """Describe an adapter folder; return plain numbers, strings, lists and dicts.

    σ and SNR statistics are over the weights with σ > 0. `modules` gives each module's medians and the share of its
    weights that are 0 after pruning `ratio` of the adapter by `criterion`. Without σ, only the adapter itself is
    described.

    Raises:
        IVONError: the folder holds no adapter, or its files do not belong together.
    """
    adapter = Adapter(path_or_hub_id)
    summary: dict[str, Any] = {
        "adapter": str(path_or_hub_id),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "peft_type": adapter.config.get("peft_type"),
        "r": adapter.config.get("r"),
        "lora_alpha": adapter.config.get("lora_alpha"),
        "tensors": len(adapter.mean),
        "weights": adapter.mean.weights,
        "dtypes": dict(Counter(dtype for dtype, _ in adapter.mean.specs.values())),
        "posterior": adapter.sigma is not None,
        "header": dict(sorted(adapter.metadata.items())),
    }
    if adapter.sigma is None:
        sizes = {name: sum(map(adapter.mean.size, keys)) for name, keys in modules(adapter.mean).items()}
        return summary | {"modules": [{"module": name, "weights": size} for name, size in sizes.items()]}
    posterior = Posterior.from_pretrained(path_or_hub_id, reporter)
    noisy, sigma, snr = 0, np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    rows = []
    has_noise = any(posterior.sigma.each(lambda key: bool(posterior.sigma.raw(key).any())).values())
    pruned = posterior.prune(ratio, criterion, reporter=reporter).pruned() if has_noise else {}
    for name, keys in modules(posterior.mean).items():
        s = np.concatenate([posterior.sigma.raw(key).reshape(-1) for key in keys])
        m = np.concatenate([posterior.mean.float32(key).reshape(-1) for key in keys])
        weights, kept = len(s), s > 0
        if not kept.all():
            s, m = s[kept], m[kept]
        with np.errstate(over="ignore"):
            ratios = np.minimum(np.abs(m) / s, _LARGEST)
        noisy += len(s)
        sigma += _counts(s)
        snr += _counts(ratios)
        rows.append(
            {
                "module": name,
                "weights": weights,
                "sigma_median": _median(s),
                "snr_median": _median(ratios),
                "pruned": sum(pruned.get(key, 0) for key in keys) / max(weights, 1),
            }
        )
        reporter.advance("measuring", weights, posterior.mean.weights)
    return summary | {
        "weights_with_sigma": noisy,
        "sigma": _quantiles(sigma),
        "snr": _quantiles(snr),
        "snr_histogram": _histogram(snr),
        "prune_ratio": ratio,
        "prune_criterion": criterion,
        "would_prune": sum(pruned.values()),
        "modules": rows,
    }


def _median(values: np.ndarray) -> float | None:
    if not len(values):
        return None
    with np.errstate(over="ignore"):  # of the sum of the middle two
        return min(float(np.median(values)), float(_LARGEST))


def _counts(values: np.ndarray) -> np.ndarray:
    return np.bincount(values.view(np.uint32) >> np.uint32(_SHIFT), minlength=_BINS)[:_BINS]


def _middles() -> np.ndarray:
    bits = (np.arange(_BINS, dtype=np.uint32) << np.uint32(_SHIFT)) + np.uint32(2 ** (_SHIFT - 1))
    bits[0] = 0
    return bits.view(np.float32)


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    if not counts.any():
        return {}
    ends = np.cumsum(counts)
    places = np.searchsorted(ends, [max(1, round(q * int(ends[-1]))) for q in QUANTILES])
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, _middles()[places], strict=True)}


def _histogram(counts: np.ndarray) -> dict[str, list[Any]]:
    """Return counts between powers of ten; the first and the last bin are open."""
    filled = np.flatnonzero(counts)
    with np.errstate(divide="ignore"):
        bins = np.digitize(np.log10(_middles()[filled]), _EDGES)
    return {
        "log10_edges": list(_EDGES),
        "counts": np.bincount(bins, counts[filled], len(_EDGES) + 1).astype(int).tolist(),
    }
