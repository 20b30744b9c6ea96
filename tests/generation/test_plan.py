"""Plans that make no sense are refused, and what the others come to."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.generation.plan import Plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 12}, "n 12 is not a multiple of per_model 8; say n 8"),
        ({"n": 3}, "say n 8"),
        ({"n": 0}, "n 0"),
        ({"per_model": 0}, "per_model 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"stop": ("x", "")}, "stop ''"),
    ],
)
def test_a_wrong_plan_is_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(IVONError) as error:
        Plan(**wrong)
    assert message in str(error.value)


def test_the_mean_needs_no_multiple() -> None:
    plan = Plan(n=12, mean=True)
    assert (plan.members, plan.per_member) == (1, 12)
