"""What headers tell of a chain, and what a product of posteriors in it is made of."""

from __future__ import annotations

import json

import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.posterior.chain import CHAIN, Factor, Link, factors, links, shared


def header(name: str, *before: tuple[str, float]) -> dict[str, str]:
    chain = [[sha, strength, 100, f"outputs/{sha}"] for sha, strength in before]
    return {"mean_sha256": name, **({CHAIN: json.dumps(chain)} if chain else {})}


A = header("A")
B, C = header("B", ("A", 0.5)), header("C", ("A", 0.25))
D, E = header("D", ("B", 1.0), ("A", 0.5)), header("E", ("B", 0.1), ("A", 0.5))


def test_links_are_the_nearest_first() -> None:
    assert links(A) == []
    assert links(D) == [Link("B", 1.0, 100, "outputs/B"), Link("A", 0.5, 100, "outputs/A")]
    assert links({CHAIN: '[["A", 1, null, "x"]]'}) == [Link("A", 1.0, None, "x")]


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '[["A"]]', '[["A", "much", 1, "x"]]', "null", '{"a": 1}'])
def test_a_damaged_chain_is_one_line(damaged: str) -> None:
    with pytest.raises(IVONError, match=r"^prior_chain of a header cannot be read"):
        links({CHAIN: damaged})


def test_what_is_shared_is_the_last_common_link() -> None:
    assert shared([A, B]) == shared([B, A, C]) == shared([A]) == shared([D]) == shared([B, D]) == []
    assert shared([B, C]) == shared([C, D]) == ["A"]
    assert shared([D, E]) == ["B"]
    assert shared([D, E, C]) == ["B", "A"]
    assert shared([D, E, B]) == []


def test_factors_are_what_each_knows_beside_its_prior() -> None:
    assert factors([A, B], [1, 1]) == [Factor(0, 1, None, 0), Factor(1, 1, 0, 0.5)]
    assert factors([D, A], [2, 1]) == [Factor(0, 2, 1, 0.5), Factor(1, 1, None, 0)]
    # A prior that is not among them counts once, as strong as it was at most.
    assert factors([B, C, A], [0.3, 0.7]) == [Factor(0, 0.3, 2, 0.5), Factor(1, 0.7, 2, 0.25), Factor(2, 0.5, None, 0)]
    assert factors([D, E, B], [1, 1])[2] == Factor(2, 1.0, None, 0.0)
    both = factors([C, D, E, A, header("B", ("A", 0.5))], [1, 1, 1])
    assert both[3:] == [Factor(3, 0.5, None, 0), Factor(4, 1.0, 3, 0.5)]
    stronger, weaker = header("F", ("B", 0.2), ("A", 0.5)), header("G", ("A", 0.01))
    assert factors([E, stronger, weaker, B, A], [1, 1, 1])[4].weight == pytest.approx(0.2 * 0.5)
    assert factors([{}, {}], [1, 1]) == [Factor(0, 1, None, 0), Factor(1, 1, None, 0)]
