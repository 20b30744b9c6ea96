"""Combine several posteriors over adapters of one base model into one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IVONError, param_ref
from ..storage.dtypes import NUMPY
from ..storage.tensorfile import Spec
from .adapter import RUN_IDS, SIGMA_SHA256, UNPRUNED, changes_base, different_shapes
from .chain import CHAIN_SIZE, PRIOR_KEYS, Factor, factors, identity, links, meaning
from .tensors import Tensors

if TYPE_CHECKING:
    from .posterior import Posterior

METHODS = ("precision", "linear", "cat")
_BLOCK = 2**15

Parts = tuple[Tensors, Tensors, dict[str, str], dict[str, Any]]  # mean, σ, header and configuration

# What selects the modules that have an adapter.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What pruning, tempering and writing anew change in a header.
_CHANGING = ("tau", "pruned_ratio", "mean_sha256", UNPRUNED, SIGMA_SHA256, RUN_IDS, "library_version")
# What a sum of low-rank updates cannot express.
_NOT_LOW_RANK = (
    *("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters"),
    "alora_invocation_tokens",
)
_OF_THE_BASE = ("layer_replication", "init_lora_weights")  # what makes another base model of it
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight$")


def combine(posteriors: Sequence[Posterior], method: str, share: Sequence[float], priors: Sequence[Posterior]) -> Parts:
    """Return the parts of one posterior made of several over the same base model; `Posterior.combine` wraps it.

    "precision": the product of the Gaussians. Precisions 1/σ² are added, means are weighted by them. What several of
    them share is counted once: a fixed prior (the same numbers in `prior`, `prior_strength` and `ess`), and in a chain,
    whose posteriors were each the prior of another, the posterior before: with B and C trained from A it is B·C/A, and
    with A and B it is B (at κ = 1). An empirical prior is each posterior's own, so nothing is taken off. Where one σ
    is 0 that posterior's mean stands, pruned weights included. With `weights` w_i it is the weighted product of
    Variational Model Merging (arXiv 2412.08147): what each posterior knows beside the prior that they share is taken
    to the power w_i, Π_i (q_i/prior)^w_i · prior.

    "linear": the distribution of Σ w_i·θ_i for independent θ_i ~ q_i, so the mean Σ w_i·m_i and the variance
    Σ w_i²·σ_i². It averages the factors A and B, as a model soup does; w_i is 1/n unless `weights` are given.

    "cat": the adapter whose update of every base weight is Σ w_i·ΔW_i exactly, whatever the ranks and targets, as
    PEFT's `add_weighted_adapter(combination_type="cat")` makes it: factors are concatenated, ranks add up.

    Args:
        share: what `shares` returns.
        priors: with "precision", the posteriors that several of `posteriors` go on from and that are not among them
            (`chain.shared`), at the temperature of these.

    Raises:
        IVONError: other base models or temperatures, or adapters that the method cannot combine.
    """
    bases = [str(q.config.get("base_model_name_or_path")) for q in posteriors]
    if len({PurePath(base).name for base in bases}) > 1:
        raise IVONError(f"the adapters have different base models ({', '.join(dict.fromkeys(bases))})")
    if len({q.tau for q in posteriors}) > 1:
        raise IVONError(
            f"the posteriors have different tau ({', '.join(str(q.tau) for q in posteriors)}); combine them as they "
            "were trained and temper the result, or give them one tau with `ivon-post temper`"
        )
    if method == "cat":
        return _concatenated(posteriors, share)
    return _elementwise(posteriors, method, share, priors)


def shares(count: int, method: str = "precision", weights: Sequence[float] | None = None) -> list[float]:
    """Return the weight of each of `count` posteriors.

    Raises:
        IVONError: fewer than two, an unknown method, or weights that do not fit: worth asking before reading.
    """
    if method not in METHODS:
        raise IVONError(f"{param_ref('method')} {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if count < 2:
        raise IVONError(f"{count} posterior cannot be combined; give at least 2")
    equal = 1.0 if method == "precision" else 1 / count
    share = [equal] * count if weights is None else [float(weight) for weight in weights]
    if len(share) != count or not all(map(math.isfinite, share)):
        raise IVONError(
            f"{param_ref('weights')} {share} do not fit {count} posteriors; give one finite number for each"
        )
    if method == "precision" and (min(share) < 0 or not any(share)):
        raise IVONError(f"{param_ref('weights')} {share}: those of precisions are 0 or more, and not all 0")
    return share


def check_data(posteriors: Sequence[Posterior]) -> None:
    """Raise IVONError if two posteriors, as they were read from folders, hold the same data."""
    for one, other in itertools.combinations(posteriors, 2):
        if same_data(one, other):
            raise IVONError(
                f"{one.folder} and {other.folder} hold the same data, which would count twice: they are of one run "
                "(a copy, pruned, tempered, or an earlier checkpoint); give one of them"
            )


def same_data(one: Posterior, other: Posterior) -> bool:
    """Return whether two posteriors share a run of training or of `fit`, whatever was pruned or tempered since.

    Where a header has no ids of runs, as before version 0.3, they share it if the headers agree in all that neither
    pruning nor tempering changes, and the means in all weights that neither has pruned.
    """
    headers = [q.metadata for q in (one, other)]
    runs = [set(header.get(RUN_IDS, "").split()) for header in headers]
    if all(runs):
        return bool(runs[0] & runs[1])
    if not all("mean_sha256" in header for header in headers):  # made in memory
        return False
    facts = [{name: value for name, value in header.items() if name not in _CHANGING} for header in headers]
    same = facts[0] == facts[1] and meaning(one.config) == meaning(other.config)
    if not same or any(different_shapes(one.mean, other.mean)):
        return False
    pairs = ((one.mean.float32(key), other.mean.float32(key)) for key in one.mean)
    return all(((a == b) | (a == 0) | (b == 0)).all() for a, b in pairs)


def _header(posteriors: Sequence[Posterior], method: str, share: Sequence[float] = ()) -> dict[str, str]:
    """Return the header of the result: what all agree on; with "precision", λ and N add up."""
    first = posteriors[0].metadata
    header = {key: value for key, value in first.items() if all(q.metadata.get(key) == value for q in posteriors)}
    for name in ("mean_sha256", UNPRUNED, SIGMA_SHA256, RUN_IDS):
        header.pop(name, None)
    if all(RUN_IDS in q.metadata for q in posteriors):
        header[RUN_IDS] = " ".join(q.metadata[RUN_IDS] for q in posteriors)
    chained = any(links(q.metadata) for q in posteriors)
    for name in (CHAIN_SIZE,) if method == "precision" else PRIOR_KEYS if chained else ():
        header.pop(name, None)
    combined = f"{method} of {len(posteriors)}"
    if method == "precision":
        with contextlib.suppress(KeyError, ValueError):
            header["ess"] = repr(sum(w * float(q.metadata["ess"]) for w, q in zip(share, posteriors, strict=True)))
        try:
            size = sum(int(q.metadata["train_size"]) for q in posteriors)
            header["train_size"] = str(size)
            if chained:
                given = {identity(q.metadata) for q in posteriors}
                before = {link.sha256: link.train_size for q in posteriors for link in links(q.metadata)}
                header[CHAIN_SIZE] = str(size + sum(int(before[sha] or "") for sha in before.keys() - given))
        except (KeyError, ValueError):
            header.pop("train_size", None)
        if set(share) != {1.0}:
            combined += f", weights {', '.join(f'{weight:g}' for weight in share)}"
    return {"tau": repr(posteriors[0].tau), "pruned_ratio": "0.0", **header, "combined": combined}


def _elementwise(
    posteriors: Sequence[Posterior], method: str, share: Sequence[float], priors: Sequence[Posterior]
) -> Parts:
    first = posteriors[0]
    fix = "method cat combines adapters of different ranks and targets"
    members = [*posteriors, *priors]
    for q in members[1:]:
        others = meaning(q.config)
        for name, own in meaning(first.config).items():
            if own != others[name]:
                differ = f"the adapters differ in {name} ({first.config.get(name)}, {q.config.get(name)})"
                other_things = name in _NOT_LOW_RANK or name in _OF_THE_BASE
                raise IVONError(differ + (", so their weights mean different things" if other_things else f"; {fix}"))
        for key, shape, other in different_shapes(first.mean, q.mean):
            raise IVONError(f"the adapters differ in {key} ({shape}, {other}); {fix}")
    product = [factor for factor in factors([q.metadata for q in members], share) if factor.weight]
    fixed = _shared_prior([members[factor.node] for factor in product if factor.parent is None])

    def mean(key: str) -> np.ndarray:
        if not first.mean.is_float(key):
            return first.mean.raw(key)
        means, sigmas = [q.mean.float32(key) for q in members], [q.sigma.raw(key) for q in members]
        if method == "linear":
            values = _blockwise(lambda *m: _sum(w * x for w, x in zip(share, m, strict=True)), means)
        else:
            for i, j in itertools.combinations(range(len(means)), 2):
                if ((sigmas[i] == 0) & (sigmas[j] == 0) & (means[i] != means[j])).any():
                    raise IVONError(f"σ is 0 in two posteriors at different means of {key}; combine with method linear")
            n = len(means)
            values = _blockwise(lambda *both: _product_mean(product, both[:n], both[n:], fixed), [*means, *sigmas])
        return values.astype(NUMPY[first.mean.specs[key][0]], copy=False)

    def sigma(key: str) -> np.ndarray:
        sigmas = [q.sigma.raw(key) for q in members]
        if method == "linear":
            return _blockwise(lambda *s: np.sqrt(_sum((w * x) ** 2 for w, x in zip(share, s, strict=True))), sigmas)
        return _blockwise(
            lambda *s: 1 / np.sqrt(_product_precision(product, [_precision(x) for x in s], fixed)), sigmas
        )

    specs = {key: ("F32", shape) for key, (_, shape) in first.mean.specs.items()}
    header = _header(posteriors, method, share)
    return Tensors(first.mean.specs, mean), Tensors(specs, sigma), header, dict(first.config)


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
    """Return the sum of arrays; it is added up in the first one."""
    return functools.reduce(lambda total, array: np.add(total, array, out=total), arrays)


def _precision(sigma: np.ndarray) -> np.ndarray:
    return np.reciprocal(sigma * sigma)


def _product_precision(product: Sequence[Factor], precisions: Sequence[np.ndarray], fixed: float) -> np.ndarray:
    """Return the precision of the product, in which a fixed prior of all that have no other is counted once."""
    # No posterior knows less than its prior; rounding and a lagging Hessian estimate can make it look so.
    roots = [precisions[factor.node] for factor in product if factor.parent is None]
    claimed = functools.reduce(np.minimum, roots, np.full_like(precisions[0], fixed)) if fixed else None

    def known(factor: Factor) -> np.ndarray:
        own = precisions[factor.node]
        prior = claimed if factor.parent is None else factor.strength * precisions[factor.parent]
        return factor.weight * (own if prior is None else np.where(np.isinf(own), own, np.maximum(own - prior, 0)))

    total = _sum(map(known, product))
    return total if claimed is None else total + claimed


def _product_mean(
    product: Sequence[Factor], means: Sequence[np.ndarray], sigmas: Sequence[np.ndarray], fixed: float
) -> np.ndarray:
    """Return the mean of the product; where a σ is 0, that mean. A fixed prior has its mean at 0."""
    precisions = [_precision(sigma) for sigma in sigmas]
    # Seen from the mean of a prior, what is known beside it alone is left of the differences.
    center = next((means[factor.parent] for factor in product if factor.parent is not None), np.zeros_like(means[0]))

    def known(factor: Factor) -> np.ndarray:
        pull = precisions[factor.node] * (means[factor.node] - center)
        if factor.parent is not None:
            pull -= factor.strength * precisions[factor.parent] * (means[factor.parent] - center)
        return factor.weight * pull

    total = _sum(map(known, product)) + fixed * (0 - center) * (1 - sum(f.weight for f in product if f.parent is None))
    mean = center + total / _product_precision(product, precisions, fixed)
    for factor in product:
        m, sigma = means[factor.node], sigmas[factor.node]
        if not sigma.all():
            mean = np.where(sigma == 0, m, mean)
    return mean


def _shared_prior(posteriors: Sequence[Posterior]) -> float:
    """Return the precision λ·κ·δ·τ of a prior that all posteriors share, or 0."""
    try:
        deltas = [float(q.metadata["prior"]) * float(q.metadata.get("prior_strength", 1)) for q in posteriors]
        shared = {float(q.metadata["ess"]) * delta * q.tau for q, delta in zip(posteriors, deltas, strict=True)}
    except (KeyError, ValueError):  # "empirical", or a header that does not say
        return 0.0
    return shared.pop() if len(shared) == 1 else 0.0


def _concatenated(posteriors: Sequence[Posterior], share: Sequence[float]) -> Parts:
    owners: dict[str, list[int]] = {}  # which posteriors have a factor
    for i, q in enumerate(posteriors):
        for name in _NOT_LOW_RANK:
            if q.config.get(name):
                raise IVONError(f"method cat cannot combine adapters with {name}; use precision or linear")
        if meaning(q.config)["layer_replication"] != meaning(posteriors[0].config)["layer_replication"]:
            raise IVONError("the adapters differ in layer_replication, so their weights mean different things")
        if changes_base(q.config):
            raise IVONError(
                f"method cat cannot combine adapters with init_lora_weights {q.config['init_lora_weights']!r}, "
                "which changes the base model"
            )
        for key in q.mean:
            if not _FACTOR.match(key):
                raise IVONError(f"method cat combines LoRA factors only, and {key} is none; use precision or linear")
            owners.setdefault(key, []).append(i)
    specs: dict[str, Spec] = {}
    for key, holders in owners.items():
        axis = _axis(key)
        shapes = [posteriors[i].mean.specs[key][1] for i in holders]
        if flat := [each for each in shapes if len(each) < 2]:
            raise IVONError(f"method cat combines matrices, and {key} has shape {list(flat[0])}")
        rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
        if len(rests) > 1:
            raise IVONError(
                f"the adapters differ in {key} ({shapes[0]}, {shapes[-1]}) beyond the rank; one base model?"
            )
        shape = list(shapes[0])
        shape[axis] = sum(each[axis] for each in shapes)
        specs[key] = (posteriors[holders[0]].mean.specs[key][0], tuple(shape))

    def joined(key: str, values_of: Callable[[Posterior], np.ndarray]) -> np.ndarray:
        pieces = []
        for i in owners[key]:
            values = values_of(posteriors[i])
            if _axis(key) == 0:  # the factor A alone takes the scaling of B·A
                values = values * np.float32(share[i] * scaling(posteriors[i], key))
            pieces.append(values)
        return np.concatenate(pieces, axis=_axis(key))

    def mean(key: str) -> np.ndarray:
        return joined(key, lambda q: q.mean.float32(key)).astype(NUMPY[specs[key][0]])

    def sigma(key: str) -> np.ndarray:
        return np.abs(joined(key, lambda q: q.sigma.raw(key)))  # a weight may be negative

    sigma_specs = {key: ("F32", shape) for key, (_, shape) in specs.items()}
    # The scaling is 1 everywhere: alpha is the rank.
    ranks = {match[1]: specs[key][1][0] for key in specs if (match := _FACTOR.match(key)) and match[2] == "A"}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = posteriors[0].config | {"r": usual, "lora_alpha": usual, "use_rslora": False, "init_lora_weights": True}
    config |= {"rank_pattern": others, "alpha_pattern": others}
    if any(q.config.get(name) != config.get(name) for q in posteriors for name in _TARGETS):
        config |= dict.fromkeys(_TARGETS) | {"target_modules": sorted(ranks)}
    return Tensors(specs, mean), Tensors(sigma_specs, sigma), _header(posteriors, "cat"), config


def _axis(key: str) -> int:
    """Return the axis of a factor that is the rank: the rows of A, the columns of B."""
    return 0 if key.endswith(".lora_A.weight") else 1


def scaling(q: Posterior, key: str) -> float:
    """Return what PEFT multiplies B·A of the module of a factor with: alpha/r, or alpha/√r (rsLoRA)."""
    match = _FACTOR.match(key)
    assert match
    rank = q.mean.specs[key][1][_axis(key)]
    try:
        alpha = q.config.get("lora_alpha", 8)
        for pattern, value in (q.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", match[1]):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if q.config.get("use_rslora") else rank))
    except (TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise IVONError(f"adapter_config.json: lora_alpha or alpha_pattern cannot be read ({error})") from error
