"""How sure the outputs for one prompt are of its answer, and why not: semantic entropy, between draws and within.

Outputs with one meaning form a cluster (Kuhn et al. 2023, arXiv 2302.09664; Farquhar et al. 2024, Nature 630). With
p(c) the share of cluster c in all outputs, p_m(c) that in the outputs of member m, and w_m the share of these:

    semantic entropy    H[p] = −Σ_c p(c) log p(c)    how open the answer is, for whatever reason
    expected entropy    Σ_m w_m H[p_m]               within draws: to each of them the answer is open
    mutual information  H[p] − Σ_m w_m H[p_m]        between draws: they give different answers, the model does not know

All three are in nats, and are those of the outputs that there are. Of few outputs they are biased: with n outputs of M
members and K clusters the mutual information of equal members is about (M − 1)(K − 1)/2n in place of 0 (Miller 1955).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from ..metrics.auroc import auroc
from ..metrics.selective import RiskCoverage, prr

# Field of an `Uncertainty` -> its sign: 1 where more of it is less sure.
MEASURES = {"confidence": -1, "semantic_entropy": 1, "expected_entropy": 1, "mutual_information": 1}


@dataclass(frozen=True)
class Uncertainty:
    """How sure the outputs of one prompt are: the share of the chosen answer, and the entropies over all answers."""

    confidence: float
    semantic_entropy: float
    expected_entropy: float
    mutual_information: float


def by_answer(answers: Sequence[str | None]) -> list[int]:
    """Return the cluster of each answer: equal ones share one. An empty answer (None) forms a cluster of its own."""
    first: dict[str | None, int] = {}
    return [i if answer is None else first.setdefault(answer, i) for i, answer in enumerate(answers)]


def cluster_shares(clusters: Sequence[int]) -> np.ndarray:
    """Return, for each output, the share of the outputs that are in its cluster, shape [n]."""
    _, index, counts = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    return counts[index] / len(index)


def measure(clusters: Sequence[int], members: Sequence[int], chosen: int, temperature: float = 1.0) -> Uncertainty:
    """Return the uncertainty of one prompt.

    Args:
        clusters, members: of each output; equal numbers are one cluster, or one member.
        chosen: the index of the chosen output, whose confidence is returned.
        temperature: of the confidence alone: p(c)^(1/T), scaled to sum 1, is what a prediction's probabilities become.
    """
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    _, member = np.unique(np.asarray(members), return_inverse=True)
    joint = np.zeros((member.max() + 1, cluster.max() + 1))
    np.add.at(joint, (member, cluster), 1 / len(cluster))
    powers = joint.sum(0) ** (1 / temperature)
    return Uncertainty(float(powers[cluster[chosen]] / powers.sum()), *split_entropy(joint))


def split_entropy(joint: np.ndarray) -> tuple[float, float, float]:
    """Return entropy, expected entropy and mutual information, in nats, of shares of (members, classes), sum 1."""
    entropy = entr(joint.sum(0)).sum()
    expected = entr(joint).sum() - entr(joint.sum(1)).sum()  # H(member, class) − H(member) = Σ_m w_m H[p_m]
    return max(0.0, float(entropy)), max(0.0, float(expected)), max(0.0, float(entropy - expected))


def or_none(value: float | np.ndarray) -> float | None:
    """Return a number for JSON: None in place of NaN."""
    return None if math.isnan(value) else float(value)


def judge(
    uncertainties: Sequence[Uncertainty], wrong: np.ndarray, quality: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """Return how well each measure tells the wrong choices: `mean`, `auroc`, `aurc` and `prr`.

    A figure without a value is None: the AUROC without a wrong choice, say.

    Args:
        wrong: 1 where the choice for a prompt is wrong, else 0, shape [prompts].
        quality: of each choice, more is better, shape [prompts].
    """
    judged = {}
    for name, sign in MEASURES.items():
        # Equal values may differ in their last bits, as sums in another order do: that is no order.
        score = np.round(sign * np.array([getattr(uncertainty, name) for uncertainty in uncertainties]), 12)
        judged[name] = {
            "mean": float(sign * score.mean()),
            "auroc": or_none(auroc(score, wrong)),
            "aurc": or_none(RiskCoverage(-score, wrong).aurc()),
            "prr": or_none(prr(-score, quality)),
        }
    return judged
