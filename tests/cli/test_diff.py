"""`ivon-post diff`: the library's comparison, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def test_diff(tiny_adapter: Path, make_adapter: Callable, ivon_post):
    other = make_adapter(seed=1)
    text = ivon_post("diff", tiny_adapter, other)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert [line[0] for line in lines] == [
        "module",
        *(f"model.layers.{i}.self_attn.{n}_proj" for i in "01" for n in "qv"),
        "all",
    ]
    facts = ivon_post.json("diff", tiny_adapter, other)
    assert facts["weights"] == 896
    assert float(lines[-1][2]) == pytest.approx(facts["kl_ab"], rel=5e-3)
    assert facts["kl_ab"] == pytest.approx(sum(row["kl_ab"] for row in facts["modules"]))
