"""A file of n-best lists from an adapter, without the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write_chats

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.generation.generate import Generated, drawn_posterior, generate
from axolotl_ivon.generation.plan import Plan

PLAN = Plan(n=4, per_model=2, max_tokens=5)


def test_a_file_is_filled_and_then_left(tiny_adapter: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 4)
    begun: list[tuple[str, int]] = []
    prompts, tokens = [], []

    def begin(doing: str, total: int) -> Callable[[int], None]:
        begun.append((doing, total))
        return prompts.append

    path = tmp_path / "out.jsonl"
    first = generate(str(tiny_adapter), chats, path, PLAN, limit=3, batch_size=4, begin=begin, count=tokens.append)
    assert (first.prompts, first.resumed, first.tokens) == (3, 0, max(tokens))
    assert first.tokens_per_second == pytest.approx(max(tokens) / first.seconds)
    assert begun == [("loading the tokenizer", 0), ("loading the base model", 0), ("generating", 3)]
    assert prompts == [1, 1, 1]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [[output["member"] for output in line["outputs"]] for line in lines] == [[0, 0, 1, 1]] * 3
    assert generate(str(tiny_adapter), chats, path, PLAN, limit=3, begin=begin) == Generated(3, 3)
    assert Generated(3, 3).tokens_per_second == 0
    assert begun[3:] == [("loading the tokenizer", 0)], "a file that lacks nothing needs no model"


def test_the_posterior_that_is_drawn_from(tiny_adapter: Path, make_adapter: Callable[..., Path]) -> None:
    expected = Posterior.from_pretrained(tiny_adapter).prune(0.3).temper(2.0)
    opened = drawn_posterior(str(tiny_adapter), PLAN, 2.0, 0.3)
    assert all(torch.equal(opened.sigma[key], expected.sigma[key]) for key in expected.sigma)
    plain = str(make_adapter(sigma=False))
    mean = drawn_posterior(plain, Plan(n=4, mean=True))
    assert not any(sigma.any() for sigma in mean.sigma.values())
    for plan, ratio in ((PLAN, 0.0), (Plan(n=4, mean=True), 0.1)):
        with pytest.raises(IVONError, match=r"has no ivon_sigma\.safetensors"):
            drawn_posterior(plain, plan, math.inf, ratio)
