"""What tests of evaluations share: rows, how scores are compared, an evaluation of the tiny model and a sweep of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write_chats

from axolotl_ivon.decisions.sweep import Sweep, check_grid, sweep
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.variants import paper_variants
from axolotl_ivon.metrics.scores import Scores

DRAWS = Sampling(samples=3, seed=5)
ROWS = list(paper_variants(tau=0.5, ratio=0.3).values())


def close(one: list[Scores], other: list[Scores], tolerance: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        first, second = a.group.argsort(stable=True), b.group.argsort(stable=True)
        for name in ("confidence", "nll", "brier", "entropy", "expected_entropy"):
            torch.testing.assert_close(
                getattr(a, name)[first], getattr(b, name)[second], rtol=tolerance, atol=tolerance
            )


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=24)


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter()


@pytest.fixture(scope="module", params=["choice", "generate"])
def evaluation(request: pytest.FixtureRequest, adapter: Path, chats: Path) -> Evaluation:
    return Evaluation(adapter, EvaluationData([chats], task=request.param))


@pytest.fixture(scope="module")
def scores(evaluation: Evaluation) -> list[Scores]:
    return evaluation.run(ROWS, DRAWS)


@pytest.fixture(scope="module")
def swept(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    data = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=31)
    return Evaluation(make_adapter(), EvaluationData([data]))


@pytest.fixture(scope="module")
def result(swept: Evaluation) -> Sweep:
    return sweep(swept, check_grid((0.3, 1.0, math.inf), (0.0, 0.4)), "nll", sampling=Sampling(seed=4, samples=2))
