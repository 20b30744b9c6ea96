"""A chain of posteriors, each the prior of the next, as their headers record it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..errors import IVONError, param_ref
from .adapter import UNPRUNED, Adapter, changes_base, mean_sha256, posterior_number

if TYPE_CHECKING:
    from .posterior import Posterior

# Keys of the header, beside `prior` (where it was read from) and `prior_strength` (κ).
PRIOR_SHA256, CHAIN, CHAIN_SIZE = "prior_sha256", "prior_chain", "chain_train_size"
PRIOR_KEYS = ("prior", PRIOR_SHA256, "prior_strength", CHAIN, CHAIN_SIZE)

# What must agree for a weight of one adapter to mean the same as that weight of another; see `meaning`.
_MEANING = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("trainable_token_indices", "alora_invocation_tokens", "layer_replication"),
)
# The plugin's YAML keys of some of them.
YAML_KEYS = {"r": "lora_r", "use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora"}
YAML_KEYS |= {name: f"lora_{name}" for name in ("rank_pattern", "alpha_pattern", "fan_in_fan_out")}


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of adapter_config.json that must agree for weights of two adapters to mean the same.

    A key that is absent is off. Initializations count where they change the base model: the adapter is what it lacks.
    """
    start = config["init_lora_weights"] if changes_base(config) else None
    values = {**{name: config.get(name) or None for name in _MEANING}, "init_lora_weights": start}
    return cast(dict[str, Any], json.loads(json.dumps(values)))  # a PeftConfig may have tuples where a file has lists


class Link(NamedTuple):
    """A posterior earlier in the chain: the prior of another one, or the prior of that prior, and so on.

    Attributes:
        sha256: the fingerprint of its mean.
        strength: the factor by which its precision, as trained, counts in the posterior after it: κ, at most 1
            (`IVONLoRA.sigma_for_next_prior`), times its τ.
        train_size: N of its own data; None if its header has none.
        name: the folder or Hub id that it was read from.
    """

    sha256: str
    strength: float
    train_size: int | None
    name: str


def links(header: Mapping[str, str]) -> list[Link]:
    """Return the chain before the posterior with this header, the nearest first."""
    try:
        chain = json.loads(header.get(CHAIN, "[]"))
        return [Link(str(x[0]), float(x[1]), None if x[2] is None else int(x[2]), str(x[3])) for x in chain]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise IVONError(f"{CHAIN} of a header cannot be read ({header.get(CHAIN)!r:.200})") from error


def prior_header(prior: Posterior, strength: float, train_size: str | None) -> dict[str, str]:
    """Return the header keys by which a run records the posterior that is its prior.

    `train_size` is N of the run itself. `chain_train_size`, N of all data since the first posterior, is there if every
    link has its own.
    """
    snapshot = re.search(r"models--(.+?)--(.+?)/snapshots/", str(prior.folder))
    name = "/".join(snapshot.groups()) if snapshot else str(prior.folder or "in memory")
    sha256 = mean_sha256(prior.mean)
    first = Link(sha256, min(strength, 1.0) * prior.tau, _whole(prior.metadata.get("train_size")), name)
    chain = [first, *links(prior.metadata)]
    header = {"prior": name, PRIOR_SHA256: sha256, "prior_strength": repr(float(strength)), CHAIN: json.dumps(chain)}
    sizes = [_whole(train_size), *(link.train_size for link in chain)]
    known = [size for size in sizes if size is not None]
    return header | ({CHAIN_SIZE: str(sum(known))} if len(known) == len(sizes) else {})


def identity(header: Mapping[str, str]) -> str | None:
    """Return the fingerprint by which links name a posterior: of its mean, before pruning if it was pruned."""
    return header.get(UNPRUNED) or header.get("mean_sha256")


class Factor(NamedTuple):
    """A factor of a product of posteriors: one of them, without its prior if that is in the product too.

    Attributes:
        node: the posterior, by its place among all that take part.
        weight: the power that the factor is taken to.
        parent: the posterior that is its prior, or None.
        strength: the factor by which the parent's precision counts in that prior.
    """

    node: int
    weight: float
    parent: int | None
    strength: float


def shared(headers: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the fingerprints of priors that several posteriors share and that are not among them.

    Of a common chain it is the last link, which contains those before it.
    """
    given, after = {identity(header) for header in headers}, dict[str, set[str]]()
    for header in headers:
        before = str(identity(header))
        for link in links(header):
            if link.sha256 in given:
                break
            after.setdefault(link.sha256, set()).add(before)
            before = link.sha256
    return [sha256 for sha256, children in after.items() if len(children) > 1]


def factors(headers: Sequence[Mapping[str, str]], weights: Sequence[float]) -> list[Factor]:
    """Return the factors of a product in which nothing is counted twice.

    Args:
        headers: of the posteriors that are combined, then of the priors that `shared` names. Each prior counts once, at
            the largest strength that it has had.
        weights: the power of each posterior that is combined.
    """
    places = {str(identity(header)): i for i, header in reversed([*enumerate(headers)])}
    product = []
    for i, header in enumerate(headers):
        factor, strength = Factor(i, weights[i] if i < len(weights) else 0.0, None, 0.0), 1.0
        for link in links(header):
            strength *= link.strength
            if link.sha256 in places:
                factor = factor._replace(parent=places[link.sha256], strength=strength)
                break
        product.append(factor)
    priors = range(len(weights), len(headers))
    for i in sorted(priors, key=lambda i: -len(links(headers[i]))):  # the latest first
        powers = (factor.strength * (factor.weight if factor.node in priors else 1) for factor in product)
        product[i] = product[i]._replace(
            weight=max(power for power, factor in zip(powers, product, strict=True) if factor.parent == i)
        )
    return product


def _whole(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def check_prior(prior: str | Posterior, config: Mapping[str, Any]) -> None:
    """Check a prior, before any model is loaded where it is in a folder.

    Args:
        prior: the folder or Hub id of the posterior, or the posterior itself.
        config: the keys of adapter_config.json that are known of the adapter to be trained; only these are compared.

    Raises:
        IVONError: there is no such adapter, it has no σ, it was pruned, its τ is infinite, or it is over another base
            model, or has another rank or scaling.
    """
    held: Adapter | Posterior
    if isinstance(prior, str):
        try:
            held, named = Adapter(prior), f"{param_ref('prior')}: {prior}"
        except IVONError as error:
            raise IVONError(
                f"{param_ref('prior')}: {prior!r} is refused, it must be 'empirical', a number, or the folder or Hub "
                f"id of an adapter with σ ({error})"
            ) from error
    else:
        held, named = prior, f"{param_ref('prior')}: {prior.folder or 'the posterior'}"
    if held.sigma is None:
        raise IVONError(f"{named} has no σ, so it is no posterior: train it with ivon_lora, or use it without a prior")
    header = held.metadata
    if posterior_number(header, "pruned_ratio") or UNPRUNED in header:
        raise IVONError(f"{named} is pruned, and pruned weights cannot be trained; give the adapter before pruning")
    if math.isinf(posterior_number(header, "tau")):
        raise IVONError(f"{named} has tau inf, so it has no width; give the adapter before tempering")
    bases = [PurePath(str(x.get("base_model_name_or_path"))).name for x in (held.config, config)]
    if bases[0] != bases[1] and "None" not in bases:
        raise IVONError(f"{named} is over {bases[0]} and this adapter over {bases[1]}; give a posterior over that")
    others = meaning(config)
    for key, own in meaning(held.config).items():
        if held.config and key in config and own != others[key]:
            own, other = held.config.get(key), config.get(key)
            raise IVONError(f"{named} has {key} {own} and this adapter {other}; set {YAML_KEYS.get(key, key)}: {own}")
