"""The key-value cache under the name that another transformers gives it."""

from __future__ import annotations

from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl_ivon.models.forward import cache_name, forward_parameters

NAMES = ("cache", "past_key_values")


def rename_cache(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the base model's forward take, and give back, its cache as `name` only; return where lengths are noted."""
    base = model.get_base_model()
    forward, own = base.forward, cache_name(forward_parameters(model))
    lengths: list[int] = []

    def renamed(**given: Any) -> SimpleNamespace:
        cache = given.pop(name, None)
        assert not given.keys() & set(NAMES)
        lengths.append(given["input_ids"].shape[1])
        output = forward(**given, **{own: cache})
        return SimpleNamespace(logits=output.logits, **{name: getattr(output, own)})

    names = ("input_ids", "attention_mask", "position_ids", name, "logits_to_keep")
    renamed.__signature__ = Signature([Parameter(key, Parameter.KEYWORD_ONLY) for key in names])  # type: ignore[attr-defined]
    monkeypatch.setattr(base, "forward", renamed)
    return lengths
