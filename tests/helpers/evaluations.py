"""What tests of evaluations share: rows, and how scores are compared."""

from __future__ import annotations

import torch

from axolotl_ivon.evaluation.evaluate import rows_of
from axolotl_ivon.evaluation.metrics import Scores

ROWS = list(rows_of(tau=0.5, ratio=0.3).values())


def close(one: list[Scores], other: list[Scores], tolerance: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        first, second = a.group.argsort(stable=True), b.group.argsort(stable=True)
        for name in ("confidence", "nll", "brier", "entropy", "expected_entropy"):
            torch.testing.assert_close(
                getattr(a, name)[first], getattr(b, name)[second], rtol=tolerance, atol=tolerance
            )
