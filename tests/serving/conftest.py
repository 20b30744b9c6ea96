"""An engine over the tiny model, and a server of it on a real socket."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import serving

from axolotl_ivon import Posterior
from axolotl_ivon.data.chats import Chat
from axolotl_ivon.data.encode import render
from axolotl_ivon.models.session import load_model, load_tokenizer
from axolotl_ivon.serving.api.app import Guard
from axolotl_ivon.serving.backend import Limits, Local
from axolotl_ivon.serving.local.engine import Engine

Serve = Callable[..., contextlib.AbstractContextManager[str]]


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


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama, str(tiny_llama))


@pytest.fixture(scope="session")
def serve(engine: Engine, tokenizer: Any) -> Serve:
    """A function that serves an engine, the tiny one by default, inside a block and gives the address."""
    encoder = copy.deepcopy(tokenizer)

    def start(steps: Any = engine, guard: Guard | None = None, **limits: Any) -> Any:
        def chat(messages: list[dict[str, str]]) -> list[int]:
            return render(encoder, [Chat(tuple(messages), None, "messages")])[0].ids

        def begin() -> Local:
            return Local(steps, chat, lambda text: encoder(text)["input_ids"], Limits(**limits))

        return serving(begin, guard)

    return start


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    """A server of the tiny engine."""
    with serve() as url:
        yield url
