"""The uncertainty of a prompt's outputs against closed forms and brute force."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon.generation.uncertainty import (
    Uncertainty,
    by_answer,
    cluster_shares,
    judge,
    measure,
    output_weights,
)

LOG2 = math.log(2)
OUTPUTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("clusters", "members", "total", "within"),
    [
        ("AAAA", [0, 0, 1, 1], 0, 0),  # all agree
        ("AABB", [0, 0, 1, 1], LOG2, 0),  # each draw knows its own answer
        ("ABAB", [0, 0, 1, 1], LOG2, LOG2),  # to each draw the answer is open
        ("ABCD", [0, 0, 1, 1], 2 * LOG2, LOG2),  # half and half
        ("ABCD", [0, 0, 0, 0], 2 * LOG2, 2 * LOG2),  # one member, which cannot disagree with itself
    ],
)
def test_entropies_in_closed_form(clusters: str, members: list[int], total: float, within: float) -> None:
    found = measure([ord(c) for c in clusters], members, 0)
    assert found.semantic_entropy == pytest.approx(total)
    assert found.expected_entropy == pytest.approx(within)
    assert found.mutual_information == pytest.approx(total - within)
    assert found.confidence == clusters.count(clusters[0]) / len(clusters)


def brute(outputs: list[tuple[int, int]], level: str) -> tuple[dict[int, float], float, float]:
    """Return the weight of each cluster, the entropy, and the expected entropy, by the definitions."""
    members = Counter(m for _, m in outputs)
    weight = {m: 1 / len(members) if level == "model" else n / len(outputs) for m, n in members.items()}

    def entropy(shares: list[float]) -> float:
        return -sum(p * math.log(p) for p in shares if p)

    inside = {m: {c: sum(o == (c, m) for o in outputs) / members[m] for c in {c for c, _ in outputs}} for m in members}
    total = {c: sum(weight[m] * inside[m][c] for m in members) for c in {c for c, _ in outputs}}
    within = sum(weight[m] * entropy(list(inside[m].values())) for m in members)
    return total, entropy(list(total.values())), within


@given(OUTPUTS, st.sampled_from(["sequence", "model"]))
def test_the_split_is_that_of_the_definitions(outputs: list[tuple[int, int]], level: str) -> None:
    clusters, members = [c for c, _ in outputs], [m for _, m in outputs]
    total, entropy, within = brute(outputs, level)
    found = measure(clusters, members, 0, level)
    assert found.confidence == pytest.approx(total[clusters[0]])
    assert found.semantic_entropy == pytest.approx(entropy, abs=1e-12)
    assert found.expected_entropy == pytest.approx(within, abs=1e-12)
    assert found.mutual_information == pytest.approx(entropy - within, abs=1e-12)
    assert found.mutual_information >= 0
    weights = output_weights(members, level)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(cluster_shares(clusters, weights), [total[c] for c in clusters])


@given(OUTPUTS, st.randoms(use_true_random=False))
def test_neither_order_nor_names_count(outputs: list[tuple[int, int]], random: object) -> None:
    shuffled = list(enumerate(outputs))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen = next(place for place, (i, _) in enumerate(shuffled) if i == 0)
    one = measure([c for c, _ in outputs], [m for _, m in outputs], 0)
    other = measure([9 - c for _, (c, _) in shuffled], [7 * m for _, (_, m) in shuffled], chosen)
    assert vars(one) == pytest.approx(vars(other), abs=1e-12)


def test_temperature_makes_the_confidence_what_it_makes_of_probabilities() -> None:
    # Shares 3/4 and 1/4 at T = 2: square roots, scaled to sum 1; the entropies are of the outputs as they are.
    found = measure([0, 0, 0, 1], [0, 0, 1, 1], 0, temperature=2)
    assert found.confidence == pytest.approx(math.sqrt(0.75) / (math.sqrt(0.75) + math.sqrt(0.25)))
    assert found.semantic_entropy == measure([0, 0, 0, 1], [0, 0, 1, 1], 0).semantic_entropy


def test_no_answer_agrees_with_nothing() -> None:
    clusters = by_answer(["7", None, "7", None, "8"])
    assert clusters[0] == clusters[2]
    assert len(set(clusters)) == 4


def test_measures_are_judged_by_what_they_order() -> None:
    found = [Uncertainty(0.9, 0.1, 0.1, 0.0), Uncertainty(0.6, 0.2, 0.2, 0.0), Uncertainty(0.4, 0.3, 0.0, 0.3)]
    told = judge(found, np.array([0.0, 0.0, 1.0]), quality=np.array([1.0, 0.8, 0.1]))
    assert told["confidence"]["mean"] == pytest.approx(19 / 30)
    assert told["confidence"]["auroc"] == told["semantic_entropy"]["auroc"] == 1
    assert told["confidence"]["prr"] == pytest.approx(1)
    assert told["expected_entropy"]["auroc"] == 0  # the wrong one is the surest
    # By falling confidence the risks are 0, 0, 1/3; by the trapezoidal rule over two steps 1/12.
    assert told["confidence"]["aurc"] == pytest.approx(1 / 12)
    told = judge(found, np.zeros(3))
    assert told["confidence"]["auroc"] is None
    assert told["confidence"]["aurc"] == 0
    assert "prr" not in told["confidence"]
