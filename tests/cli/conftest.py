"""An adapter that training has calibrated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axolotl_ivon import Posterior


@pytest.fixture
def calibrated(tiny_adapter: Path, copied: Callable[..., Path]) -> Callable[..., Path]:
    """A function that returns a copy of the tiny adapter in which the mean is recommended, or other `values`."""

    def make(**values: Any) -> Path:
        folder = copied(tiny_adapter)
        sha = Posterior.from_pretrained(folder).metadata["mean_sha256"]
        document = {"tau": "inf", "ratio": 0.0, "temperature": 1.5, "draws": {"tau": 4.0, "temperature": 0.8}}
        (folder / "recommended.json").write_text(json.dumps({**document, "mean_sha256": sha, **values}))
        return folder

    return make
