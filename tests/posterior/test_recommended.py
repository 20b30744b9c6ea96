"""A recommendation is of one adapter, or of what `temper` and `prune` make of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.posterior.recommended import recommended_from, tau_on_top
from axolotl_ivon.records.recommendation import Recommendation


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"mean_sha256": "a"}, ""),
        ({"mean_sha256": "b"}, "was chosen for another adapter"),
        ({"mean_sha256": "b", "unpruned_sha256": "a", "pruned_ratio": "0.1"}, ""),
        ({"mean_sha256": "b", "unpruned_sha256": "a", "pruned_ratio": "0.5"}, "0.5 of this adapter are pruned already"),
        ({"mean_sha256": "a", "tau": "inf"}, "this adapter is the mean alone"),
    ],
    ids=str,
)
def test_of_which_adapters_it_is(tmp_path: Path, header: dict[str, str], message: str) -> None:
    record = Recommendation(objective="nll", tau=2.0, ratio=0.2, mean_sha256="a")
    record.save(tmp_path / "recommended.json")
    if not message:
        assert recommended_from(tmp_path / "recommended.json", header) == record
        return
    with pytest.raises(IVONError, match=message):
        recommended_from(tmp_path / "recommended.json", header)


def test_tau_comes_on_top_of_the_adapters_own() -> None:
    record = Recommendation(objective="nll", tau=2.0, ratio=0.0, adapter_tau=3.0)
    assert tau_on_top(record, {}, 2.0) == 6.0
    assert tau_on_top(record, {"tau": "3.0"}, 2.0) == 2.0
    assert tau_on_top(record, {"tau": "3.0"}, math.inf) == math.inf
