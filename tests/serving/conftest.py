"""An engine over the tiny model, and a server of it on a real socket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served import official, serving
from slow_engine import SlowEngine

from axolotl_ivon import Posterior
from axolotl_ivon.data.encode import ChatFormat
from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.models.session import Session, load_tokenizer
from axolotl_ivon.serving.api.app import Guard
from axolotl_ivon.serving.api.backend import Limits
from axolotl_ivon.serving.api.prompts import PromptReader
from axolotl_ivon.serving.local.engine import TokenEngine
from axolotl_ivon.serving.local.queue import Local

Serve = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., TokenEngine]:
    """A function that serves an adapter over the tiny model; the draws are wide, so that they differ."""

    def make(adapter: Path, rule: DecisionRule | None = None, **more: Any) -> TokenEngine:
        posterior = Posterior.from_pretrained(adapter).temper(0.002)
        return TokenEngine(Session.open(posterior), posterior, rule or DecisionRule(), name="tiny", samples=3, **more)

    return make


@pytest.fixture(scope="session")
def engine(make_engine: Callable[..., TokenEngine], tiny_adapter: Path) -> TokenEngine:
    return make_engine(tiny_adapter)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama, str(tiny_llama))


@pytest.fixture(scope="session")
def serve(engine: TokenEngine, tokenizer: Any) -> Serve:
    """A function that serves an engine, the tiny one by default, inside a block and gives the address."""

    def start(served: Any = engine, guard: Guard | None = None, **limits: Any) -> Any:
        prompts = PromptReader(lambda: tokenizer, ChatFormat(), (), served.check)
        return serving(lambda: Local(served, prompts, Limits(**limits)), guard)

    return start


@pytest.fixture(scope="package")
def url(serve: Serve) -> Iterator[str]:
    """One server of the tiny engine for all tests that change nothing."""
    with serve() as url:
        yield url


@pytest.fixture(scope="package")
def client(url: str) -> Iterator[openai.OpenAI]:
    with official(url) as client:
        yield client


@pytest.fixture
def slow() -> SlowEngine:
    return SlowEngine()
