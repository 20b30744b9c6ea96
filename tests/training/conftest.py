"""Trainers over the tiny Llama in this test's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainers import make_trainer

from axolotl_ivon import attach

Make = Callable[..., Any]


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Make:
    """`trainers.make_trainer`, which writes into the test's folder or one below it."""
    return lambda folder="", **args: make_trainer(tiny_llama, tmp_path / folder, **args)


@pytest.fixture
def attached(made: Make) -> Make:
    """A function that makes a Trainer and attaches to it with some settings, by default at α = 0.03."""

    def make(settings: dict[str, Any] | None = None, folder: str = "", **args: Any) -> Any:
        settings = settings or {}
        rate = 0.03 if settings.get("preset") == "paper" else 0.03 * settings.get("clip", 0.01)
        trainer = made(folder, **{"learning_rate": rate, **args})
        attach(trainer, **settings)
        return trainer

    return make


@pytest.fixture
def trained(attached: Make) -> Make:
    """A function that does this and trains, from a checkpoint if it is given."""

    def train(settings: dict[str, Any] | None = None, folder: str = "", resume: Any = None, **args: Any) -> Any:
        trainer = attached(settings, folder, **args)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    return train
