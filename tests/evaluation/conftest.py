"""An evaluation of the tiny model, its scores and a sweep over it, made once for each test file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluations import ROWS
from tiny import write_chats

from axolotl_ivon.evaluation.evaluate import Evaluation
from axolotl_ivon.evaluation.metrics import Scores
from axolotl_ivon.evaluation.sweep import Sweep, check_grid, sweep


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=24)


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter()


@pytest.fixture(scope="module", params=["choice", "generate"])
def evaluation(request: pytest.FixtureRequest, adapter: Path, chats: Path) -> Evaluation:
    return Evaluation(adapter, [chats], task=request.param)


@pytest.fixture(scope="module")
def scores(evaluation: Evaluation) -> list[Scores]:
    return evaluation.run(ROWS, samples=3, seed=5)


@pytest.fixture(scope="module")
def swept(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    data = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=31)
    return Evaluation(make_adapter(), [data])


@pytest.fixture(scope="module")
def result(swept: Evaluation) -> Sweep:
    return sweep(swept, check_grid((0.3, 1.0, math.inf), (0.0, 0.4)), "nll", seed=4, samples=2)
