"""An engine over the tiny model, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from axolotl_ivon import Posterior
from axolotl_ivon.models.load import load_model, load_tokenizer
from axolotl_ivon.serving.engine import Engine


@pytest.fixture(scope="session")
def make_engine(tiny_llama: Path) -> Callable[..., Engine]:
    """A function that serves an adapter over the tiny model; the draws are wide, so that they differ."""

    def make(adapter: Path, samples: int = 3, tau: float = 0.002, **options: float) -> Engine:
        tokenizer, posterior = load_tokenizer(adapter, str(tiny_llama)), Posterior.from_pretrained(adapter).temper(tau)
        return Engine(load_model(adapter), tokenizer, posterior, name="tiny", samples=samples, **options)

    return make


@pytest.fixture(scope="session")
def engine(make_engine: Callable[..., Engine], tiny_adapter: Path) -> Engine:
    return make_engine(tiny_adapter)
