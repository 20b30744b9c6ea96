"""Several posteriors over adapters of one base model, made into one."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IVONError, parameter
from ..storage.dtypes import NUMPY
from .adapter import UNPRUNED
from .tensors import Spec, Tensors

if TYPE_CHECKING:
    from .posterior import Posterior

METHODS = ("precision", "linear", "cat")
_BLOCK = 2**15

Parts = tuple[Tensors, Tensors, dict[str, str], dict[str, Any]]  # mean, σ, header and configuration

# What must agree for a weight of one adapter to mean the same as that weight of another.
_MEANING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# What selects the modules that have an adapter.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What a sum of low-rank updates cannot express.
_NOT_LOW_RANK = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters")
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight$")


def combine(
    posteriors: Sequence[Posterior], method: str = "precision", weights: Sequence[float] | None = None
) -> Parts:
    """Return the parts of one posterior made of several over the same base model; `Posterior.combine` wraps it.

    "precision": the product of the Gaussians. Precisions 1/σ² are added, means are weighted by them. A prior that
    all of them share (the same number in `prior`, and the same `ess`) is counted once; an empirical prior is each
    posterior's own, so nothing is taken off. Where one σ is 0 that posterior's mean stands, pruned weights included.

    "linear": the distribution of Σ w_i·θ_i for independent θ_i ~ q_i, so the mean Σ w_i·m_i and the variance
    Σ w_i²·σ_i². It averages the factors A and B, as a model soup does; w_i is 1/n unless `weights` are given.

    "cat": the adapter whose update of every base weight is Σ w_i·ΔW_i exactly, whatever the ranks and targets, as
    PEFT's `add_weighted_adapter(combination_type="cat")` makes it: factors are concatenated, ranks add up.

    Raises:
        IVONError: fewer than two posteriors, other base models or temperatures, an unknown method, weights that do
            not fit, or adapters that the method cannot combine.
    """
    share = shares(len(posteriors), method, weights)
    bases = [str(q.config.get("base_model_name_or_path")) for q in posteriors]
    if len({PurePath(base).name for base in bases}) > 1:
        raise IVONError(f"the adapters have different base models ({', '.join(dict.fromkeys(bases))})")
    if len({q.tau for q in posteriors}) > 1:
        raise IVONError(
            f"the posteriors have different tau ({', '.join(str(q.tau) for q in posteriors)}); combine them as they "
            "were trained and temper the result, or give them one tau with `ivon-post temper`"
        )
    return _concatenated(posteriors, share) if method == "cat" else _elementwise(posteriors, method, share)


def shares(count: int, method: str = "precision", weights: Sequence[float] | None = None) -> list[float]:
    """Return the weight of each of `count` posteriors.

    Raises:
        IVONError: fewer than two, an unknown method, or weights that do not fit: worth asking before reading.
    """
    if method not in METHODS:
        raise IVONError(f"{parameter('method')} {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if count < 2:
        raise IVONError(f"{count} posterior cannot be combined; give at least 2")
    if weights is not None and method == "precision":
        raise IVONError(
            f"{parameter('weights')} are for the methods linear and cat; precision weighs each weight by 1/σ²"
        )
    share = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(share) != count or not all(map(math.isfinite, share)):
        raise IVONError(
            f"{parameter('weights')} {share} do not fit {count} posteriors; give one finite number for each"
        )
    return share


def _header(posteriors: Sequence[Posterior], method: str) -> dict[str, str]:
    """Return the header of the result: what all agree on; effective and real data sizes add up with precisions."""
    first = posteriors[0].metadata
    facts = {key: value for key, value in first.items() if all(q.metadata.get(key) == value for q in posteriors)}
    for name in ("mean_sha256", UNPRUNED):
        facts.pop(name, None)
    if method == "precision":
        for key, kind in (("ess", float), ("train_size", int)):
            try:
                facts[key] = repr(sum(kind(q.metadata[key]) for q in posteriors))
            except (KeyError, ValueError):
                facts.pop(key, None)
    return {"tau": "1.0", "pruned_ratio": "0.0", **facts, "combined": f"{method} of {len(posteriors)}"}


def _elementwise(posteriors: Sequence[Posterior], method: str, share: Sequence[float]) -> Parts:
    first = posteriors[0]
    fix = "method cat combines adapters of different ranks and targets"
    for q in posteriors[1:]:
        for name in _MEANING:
            if q.config.get(name) != first.config.get(name):
                raise IVONError(
                    f"the adapters differ in {name} ({first.config.get(name)}, {q.config.get(name)}); {fix}"
                )
        for key in sorted(first.mean.specs.keys() | q.mean.specs.keys()):
            shapes = [p.mean.specs[key][1] if key in p.mean else None for p in (first, q)]
            if shapes[0] != shapes[1]:
                raise IVONError(f"the adapters differ in {key} ({shapes[0]}, {shapes[1]}); {fix}")
    prior = _shared_prior(posteriors)

    def mean(key: str) -> np.ndarray:
        if not first.mean.is_float(key):
            return first.mean.raw(key)
        means, sigmas = [q.mean.float32(key) for q in posteriors], [q.sigma.raw(key) for q in posteriors]
        if method == "linear":
            values = _blockwise(lambda *m: _sum(w * x for w, x in zip(share, m, strict=True)), means)
        else:
            _check_no_contradiction(key, means, sigmas)
            n = len(means)
            values = _blockwise(lambda *both: _product_mean(both[:n], both[n:], prior), [*means, *sigmas])
        return values.astype(NUMPY[first.mean.specs[key][0]], copy=False)

    def sigma(key: str) -> np.ndarray:
        sigmas = [q.sigma.raw(key) for q in posteriors]
        if method == "linear":
            return _blockwise(lambda *s: np.sqrt(_sum((w * x) ** 2 for w, x in zip(share, s, strict=True))), sigmas)
        return _blockwise(lambda *s: 1 / np.sqrt(_product_precision([_precision(x) for x in s], prior)), sigmas)

    specs = {key: ("F32", shape) for key, (_, shape) in first.mean.specs.items()}
    facts = _header(posteriors, method)
    return Tensors(first.mean.specs, mean), Tensors(specs, sigma), facts, dict(first.config)


def _blockwise(function: Callable[..., np.ndarray], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return float32 `function(*arrays)` of elementwise functions, computed in float64 in parts that fit the cache."""
    result = np.empty(arrays[0].shape, np.float32)
    flat = [array.reshape(-1) for array in arrays]
    with np.errstate(divide="ignore", invalid="ignore"):  # σ = 0: infinite precision, ∞·0 and ∞/∞
        for start in range(0, result.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            result.reshape(-1)[part] = function(*(array[part].astype(np.float64) for array in flat))
    return result


def _sum(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Return the sum of arrays that nobody else needs: the first one takes it."""
    return functools.reduce(lambda total, array: np.add(total, array, out=total), arrays)


def _precision(sigma: np.ndarray) -> np.ndarray:
    return np.reciprocal(sigma * sigma)


def _product_precision(precisions: Sequence[np.ndarray], prior: float) -> np.ndarray:
    """Return the precision of Π N(m_i, 1/precision_i) / N(0, 1/prior)^(n−1)."""
    total = functools.reduce(np.add, precisions)
    if prior:
        # No posterior knows less than its prior; rounding and a lagging Hessian estimate can make it look so.
        total = np.maximum(total - (len(precisions) - 1) * prior, functools.reduce(np.maximum, precisions))
    return total


def _product_mean(means: Sequence[np.ndarray], sigmas: Sequence[np.ndarray], prior: float) -> np.ndarray:
    """Return the mean of Π N(m_i, σ_i²) / N(0, 1/prior)^(n−1); where a σ_i is 0, that m_i."""
    precisions = [_precision(sigma) for sigma in sigmas]
    mean = _sum(p * m for p, m in zip(precisions, means, strict=True)) / _product_precision(precisions, prior)
    for m, sigma in zip(means, sigmas, strict=True):
        if not sigma.all():
            mean = np.where(sigma == 0, m, mean)
    return mean


def _check_no_contradiction(key: str, means: Sequence[np.ndarray], sigmas: Sequence[np.ndarray]) -> None:
    for i, j in itertools.combinations(range(len(means)), 2):
        if ((sigmas[i] == 0) & (sigmas[j] == 0) & (means[i] != means[j])).any():
            raise IVONError(f"σ is 0 in two posteriors at different means of {key}; combine with method linear")


def _shared_prior(posteriors: Sequence[Posterior]) -> float:
    """Return the precision λ·δ·τ of a prior that all posteriors share, or 0."""
    try:
        found = {float(q.metadata["ess"]) * float(q.metadata["prior"]) * q.tau for q in posteriors}
    except (KeyError, ValueError):  # "empirical", or a header that does not say
        return 0.0
    return found.pop() if len(found) == 1 else 0.0


def _concatenated(posteriors: Sequence[Posterior], share: Sequence[float]) -> Parts:
    owners: dict[str, list[int]] = {}  # which posteriors have a factor
    for i, q in enumerate(posteriors):
        for name in _NOT_LOW_RANK:
            if q.config.get(name):
                raise IVONError(f"method cat cannot combine adapters with {name}; use precision or linear")
        if isinstance(q.config.get("init_lora_weights"), str) and q.config["init_lora_weights"] != "gaussian":
            raise IVONError(
                f"method cat cannot combine adapters with init_lora_weights {q.config['init_lora_weights']!r}, "
                "which changes the base model"
            )
        for key in q.mean:
            if not _FACTOR.match(key):
                raise IVONError(f"method cat combines LoRA factors only, and {key} is none; use precision or linear")
            owners.setdefault(key, []).append(i)
    specs: dict[str, Spec] = {}
    for key, found in owners.items():
        axis = _axis(key)
        shapes = [posteriors[i].mean.specs[key][1] for i in found]
        if flat := [each for each in shapes if len(each) < 2]:
            raise IVONError(f"method cat combines matrices, and {key} has shape {list(flat[0])}")
        rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
        if len(rests) > 1:
            raise IVONError(
                f"the adapters differ in {key} ({shapes[0]}, {shapes[-1]}) beyond the rank; one base model?"
            )
        shape = list(shapes[0])
        shape[axis] = sum(each[axis] for each in shapes)
        specs[key] = (posteriors[found[0]].mean.specs[key][0], tuple(shape))

    def joined(key: str, values_of: Callable[[Posterior], np.ndarray]) -> np.ndarray:
        pieces = []
        for i in owners[key]:
            values = values_of(posteriors[i])
            if _axis(key) == 0:  # the factor A alone takes the scaling of B·A
                values = values * np.float32(share[i] * _scaling(posteriors[i], key))
            pieces.append(values)
        return np.concatenate(pieces, axis=_axis(key))

    def mean(key: str) -> np.ndarray:
        return joined(key, lambda q: q.mean.float32(key)).astype(NUMPY[specs[key][0]])

    def sigma(key: str) -> np.ndarray:
        return np.abs(joined(key, lambda q: q.sigma.raw(key)))  # a weight may be negative

    sigma_specs = {key: ("F32", shape) for key, (_, shape) in specs.items()}
    config = _concatenated_config(posteriors, specs)
    return Tensors(specs, mean), Tensors(sigma_specs, sigma), _header(posteriors, "cat"), config


def _axis(key: str) -> int:
    """Return the axis of a factor that is the rank: the rows of A, the columns of B."""
    return 0 if key.endswith(".lora_A.weight") else 1


def _scaling(q: Posterior, key: str) -> float:
    """Return what PEFT multiplies B·A of this module with: alpha/r, or alpha/√r (rsLoRA)."""
    match = _FACTOR.match(key)
    assert match
    rank = q.mean.specs[key][1][0]
    try:
        alpha = q.config.get("lora_alpha", 8)
        for pattern, value in (q.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", match[1]):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if q.config.get("use_rslora") else rank))
    except (TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise IVONError(f"adapter_config.json: lora_alpha or alpha_pattern cannot be read ({error})") from error


def _concatenated_config(posteriors: Sequence[Posterior], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Return the configuration of the concatenated adapter: scaling 1 everywhere, alpha equal to the rank."""
    config = dict(posteriors[0].config)
    ranks = {match[1]: specs[key][1][0] for key in specs if (match := _FACTOR.match(key)) and match[2] == "A"}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config |= {"r": usual, "lora_alpha": usual, "use_rslora": False}
    config |= {"rank_pattern": others, "alpha_pattern": others}
    if any(q.config.get(name) != config.get(name) for q in posteriors for name in _TARGETS):
        config |= dict.fromkeys(_TARGETS) | {"target_modules": sorted(ranks)}
    return config
