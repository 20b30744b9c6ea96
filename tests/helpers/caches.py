"""The key-value cache under the name that another transformers gives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from axolotl_ivon.models.forward import cache_name, forward_parameters

NAMES = ("cache", "past_key_values")


def rename_cache(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the base model's forward take, and give back, its cache as `name` only; return where lengths are noted."""
    base = model.get_base_model()
    forward, own = base.forward, cache_name(forward_parameters(model))
    lengths: list[int] = []

    def run(more: dict[str, Any], given: Any) -> SimpleNamespace:
        assert not more.keys() & set(NAMES)
        lengths.append(more["input_ids"].shape[1])
        output = forward(**more, **{own: given})
        return SimpleNamespace(logits=output.logits, **{name: getattr(output, own)})

    def new(
        input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
        logits_to_keep: Any = 0, **more: Any,
    ) -> SimpleNamespace:  # fmt: skip
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return run({**given, "logits_to_keep": logits_to_keep, **more}, cache)

    def old(
        input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        logits_to_keep: Any = 0, **more: Any,
    ) -> SimpleNamespace:  # fmt: skip
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return run({**given, "logits_to_keep": logits_to_keep, **more}, past_key_values)

    monkeypatch.setattr(base, "forward", new if name == "cache" else old)
    return lengths
