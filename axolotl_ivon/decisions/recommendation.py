"""What a recommendation means for an adapter: recommended.json, applied. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import IVONError, param_ref
from ..posterior.adapter import UNPRUNED
from ..records.recommendation import Recommendation


@dataclass(frozen=True)
class DecisionRule:
    """What is made of an averaged prediction.

    Attributes:
        temperature: its log-probabilities are divided by this.
        threshold: answer where the confidence is at least this; None: always.
        score: what that confidence is: "probability" of the answer, or "agreement" of the outputs of `mbr`.
    """

    temperature: float = 1.0
    threshold: float | None = None
    score: str = "probability"


def read_rule(path: str | Path) -> DecisionRule:
    """Return the rule of a recommended.json.

    Raises:
        IVONError: the file cannot be read, or is no recommendation.
    """
    recommendation = Recommendation.load(path, "recommended")
    return DecisionRule(recommendation.temperature, recommendation.threshold, recommendation.score)


def read_recommended(path: str | Path, header: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Return the (τ, pruning ratio) that make of an adapter the posterior that was evaluated.

    The adapter must be that of the sweep, or made of it by `temper` and `prune`, whose τ is not applied twice.

    Args:
        path: of a recommended.json.
        header: of the adapter's ivon_sigma.safetensors; None for the values as they are.

    Raises:
        IVONError: the file cannot be read, is no recommendation, or belongs to another adapter.
    """
    recommendation, named = Recommendation.load(path, "recommended"), f"{param_ref('recommended')} {path}"
    tau, ratio = recommendation.tau, recommendation.ratio
    if header is None:
        return tau, ratio
    sha = recommendation.mean_sha256
    if sha is not None and sha not in (header.get("mean_sha256"), header.get(UNPRUNED)):
        raise IVONError(
            f"{named} was chosen for another adapter (mean_sha256 differs); run `ivon-post sweep` on this one, "
            f"or give {param_ref('tau')} and {param_ref('ratio')}"
        )
    own, pruned = float(header.get("tau", 1)), float(header.get("pruned_ratio", 0))
    if sha is not None and sha == header.get(UNPRUNED) and pruned > ratio:
        raise IVONError(
            f"{named}: its ratio is {ratio:g}, and {pruned:g} of this adapter are pruned already; use the one that was "
            "swept"
        )
    swept = tau * recommendation.adapter_tau
    if math.isinf(own) and math.isfinite(swept):
        raise IVONError(f"{named}: its tau is {swept:g}, and this adapter is the mean alone; use the one swept")
    return (math.inf if math.isinf(swept) else swept / own), ratio
