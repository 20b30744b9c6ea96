"""Answers against `predict`'s average over draws, one whole pass without a cache for every token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import Posterior
from axolotl_ivon.models.load import load_model
from axolotl_ivon.models.swap import loaded, predict
from axolotl_ivon.serving.engine import Engine, mixed
from axolotl_ivon.serving.pieces import Ask, Piece

IDS = (5, 40, 7, 99, 120, 33)


def run(engine: Engine, **asked: Any) -> tuple[list[str], list[Piece]]:
    """Return the texts of the answers, and their last pieces."""
    ask = Ask(**{"model": "tiny", "ids": IDS, "max_tokens": 10, "temperature": 0.0, "top": 3, **asked})
    texts, last = [""] * ask.n, [Piece(-1, "")] * ask.n
    for pieces in engine.pieces(ask):
        for piece in pieces:
            assert last[piece.number].finish is None
            texts[piece.number] += piece.text
            last[piece.number] = piece
    assert all(piece.finish for piece in last)
    return texts, last


def tokens(engine: Engine, **asked: Any) -> list[Any]:
    """Return the first answer's tokens."""
    ask = Ask(**{"model": "tiny", "ids": IDS, "max_tokens": 10, "temperature": 0.0, "top": 3, **asked})
    return [token for pieces in engine.pieces(ask) for piece in pieces if not piece.number for token in piece.tokens]


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}], ids=["stacked", "one after another"])
def served(request: Any, make_adapter: Callable[..., Path], make_engine: Callable[..., Engine]) -> tuple[Path, Engine]:
    adapter = make_adapter(**request.param)
    return adapter, make_engine(adapter)


def test_greedy_is_the_average_of_predict_step_by_step(served: tuple[Path, Engine]) -> None:
    adapter, engine = served
    model, posterior = load_model(adapter), Posterior.from_pretrained(adapter).temper(0.002)
    ids, found = list(IDS), tokens(engine)
    assert len(found) == 10
    for token in found:
        expected = predict(model, posterior, {"input_ids": torch.tensor([ids])}, n=3)
        probabilities, disagreement = expected.probabilities[0, -1], expected.disagreement[0, -1]
        assert token.id == int(probabilities.argmax())
        assert math.exp(token.logprob) == pytest.approx(float(probabilities[token.id]), rel=1e-4)
        assert token.mutual_information == pytest.approx(float(disagreement), rel=1e-2, abs=1e-5)
        entropy = float(torch.special.entr(probabilities).sum())
        assert token.expected_entropy + token.mutual_information == pytest.approx(entropy, rel=1e-4)
        likeliest = probabilities.topk(3)
        assert [logprob for _, logprob in token.top] == pytest.approx(likeliest.values.log().tolist(), abs=1e-3)
        ids.append(token.id)
    assert max(token.mutual_information for token in found) > 1e-3  # the members differ


@pytest.mark.parametrize("member", ["mean", "member-0000", "member-0002"])
def test_a_member_and_the_mean_answer_by_themselves(engine: Engine, tiny_adapter: Path, member: str) -> None:
    posterior = Posterior.from_pretrained(tiny_adapter).temper(0.002)
    draw = posterior.mean if member == "mean" else posterior.sample(0, int(member[-1]))
    model, ids = load_model(tiny_adapter), list(IDS)
    with loaded(model, dict(draw)), torch.no_grad():
        for token in tokens(engine, model=f"tiny:{member}"):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token.id == int(logits.argmax())
            assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[token.id]), abs=1e-4)
            assert token.mutual_information == 0
            ids.append(token.id)
