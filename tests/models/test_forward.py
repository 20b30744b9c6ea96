"""Names of arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from axolotl_ivon.models.forward import cache_name, forward_parameters


def model(forward: Any) -> Any:
    return SimpleNamespace(get_base_model=lambda: SimpleNamespace(forward=forward))


def test_the_cache_is_called_as_the_signature_says() -> None:
    assert cache_name(forward_parameters(model(lambda input_ids, cache=None: None))) == "cache"
    assert cache_name(forward_parameters(model(lambda input_ids, past_key_values=None: None))) == "past_key_values"
    assert cache_name(forward_parameters(model(lambda input_ids: None))) == "past_key_values"
