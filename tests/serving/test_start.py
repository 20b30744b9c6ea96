"""From an adapter to what answers."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.serving.api.protocol import ChatRequest, CompletionRequest, read_request
from axolotl_ivon.serving.backend import Limits
from axolotl_ivon.serving.start import Address, check_name, check_packages, local_backend


def test_only_this_machine_is_served_without_a_key() -> None:
    Address()
    Address("::1")
    Address("0.0.0.0", 8000, "secret")
    for host in ("0.0.0.0", "192.168.0.7", "::"):
        with pytest.raises(IVONError, match="others can reach it; set a key with api_key or IVON_API_KEY"):
            Address(host)
    with pytest.raises(IVONError, match="an empty key keeps nobody out"):
        Address(api_key="")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(IVONError, match=r"needs the package uvicorn: pip install 'axolotl-ivon\[serve\]'"):
        check_packages()


@pytest.mark.parametrize("name", ["", "a:b", "a\nb"])
def test_a_name_is_one_word_without_a_colon(name: str) -> None:
    with pytest.raises(IVONError, match="name"):
        check_name(name)
    assert check_name("my-adapter v2") == "my-adapter v2"


def test_an_adapter_answers_under_its_own_name(tiny_adapter: Path) -> None:
    began: list[str] = []

    async def run() -> tuple[list[str], list[Any]]:
        backend = local_backend(
            f"{tiny_adapter}/", Limits(), samples=2, prune_ratio=0.5, threshold=0.5, temperature=2.0,
            begin=lambda doing, total: began.append(doing),
        )  # fmt: skip
        models = list(backend.models)
        chat = {"model": models[0], "messages": [{"role": "user", "content": "red"}], "max_tokens": 3}
        text = {"model": models[1], "prompt": "red", "max_tokens": 3}
        found = []
        for kind, body in ((ChatRequest, chat), (CompletionRequest, text)):
            answers = await backend.answer(read_request(kind, body))
            found.append([piece async for piece in answers.pieces][-1].ivon)
        await backend.close()
        return models, found

    models, found = asyncio.run(run())
    assert models == ["adapter", "adapter:mean", "adapter:member-0000", "adapter:member-0001"]
    assert [facts["members"] for facts in found] == [2, 1]
    assert all(facts["abstain"] for facts in found)
    assert began == ["loading the base model", "drawing 2 members"]
