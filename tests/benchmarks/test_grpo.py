"""benchmarks/grpo: what the old policy of the ratio does to the gradient, on the tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import grpo


def test_old_log_probabilities_at_the_mean_clip_by_noise(tiny_llama: Path) -> None:
    narrow, wide = grpo.compare(str(tiny_llama), 0, 2, [0.001, 4.0])
    deviation, share, *cosines = narrow[:4]  # draws so narrow that both policies are the mean
    assert deviation < 1e-2
    assert share == 0
    assert cosines == pytest.approx([1.0, 1.0], abs=1e-3)
    assert wide[0] > deviation
    assert wide[1] > 0.01
