"""Fixtures that the test files share: a tiny base model and adapters over it, built once per run.

Their folders are shared by all tests and never written to; a test that changes files works on a copy.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

FACTS = {"ess": "1000.0", "gamma": "100.0", "train_size": "100", "h0": "0.05", "beta1": "0.9", "beta2": "0.9995"}
FACTS |= {"clip": "0.005", "prior": "empirical", "steps": "10"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest tests come first, so that what is left at the end are short ones for all workers."""
    longest = ("integration", "robustness")
    items.sort(key=lambda item: item.path.parent.name not in longest)


@pytest.fixture(autouse=True)
def level_of_the_library_s_log() -> Iterator[None]:
    """The plugin sets it, to axolotl's: put back what it was."""
    log = logging.getLogger("axolotl_ivon")
    before = log.level
    yield
    log.setLevel(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with its tokenizer."""
    from tiny import build_llama

    return build_llama(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., Path]:
    """A function that saves a random LoRA adapter over `tiny_llama` with PEFT, and σ beside it.

    Keyword arguments are PEFT's LoraConfig's; `dtype`, `seed`, `sigma` (False: none) and `facts` are ours.
    """

    def make(
        dtype: str = "float32", seed: int = 0, sigma: bool = True, facts: dict[str, str] | None = None, **lora: object
    ) -> Path:
        import torch
        from tiny import build_lora, with_sigma

        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": True, **lora}
        folder = build_lora(tiny_llama, tmp_path_factory.mktemp("adapter") / "adapter", dtype, noise=0.05, **settings)
        if sigma:
            with_sigma(folder, lambda mean: torch.rand(mean.shape) * 0.05 + 0.01, {**FACTS, **(facts or {})})
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapter(make_adapter: Callable[..., Path]) -> Path:
    """A LoRA adapter (r 4 on q and v) over `tiny_llama`, with a valid ivon_sigma.safetensors."""
    return make_adapter()


@pytest.fixture(scope="session")
def other_adapter(make_adapter: Callable[..., Path]) -> Path:
    """Another one over the same base model."""
    return make_adapter(seed=1)


@pytest.fixture(scope="session")
def plain_adapter(make_adapter: Callable[..., Path]) -> Path:
    """An adapter without σ."""
    return make_adapter(sigma=False)


@pytest.fixture(scope="session")
def pipeline(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pipeline.Pipeline`: what eval, sweep, influence, generate and card make of `tiny_adapter`, for all to read."""
    from pipeline import Pipeline

    return Pipeline(tiny_adapter, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def chats(pipeline: Any) -> Path:
    """24 questions with the answers A and B."""
    return pipeline.chats


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that copies a folder to `tmp_path`, for a test that changes or writes beside it."""

    def copy(folder: Path, name: str = "adapter") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function after whose call the memory runs out in backward passes over more examples than it was given."""
    from torch import OutOfMemoryError

    from axolotl_ivon.models import gradients

    label_logits = gradients.label_logits

    def limit(most: int) -> None:
        def limited(model: Any, items: Any) -> Any:
            if len(items) > most:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return label_logits(model, items)

        monkeypatch.setattr(gradients, "label_logits", limited)

    return limit


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Any:
    """A `runs.Configs` in a folder of this module, with a small data set in it."""
    from runs import ROWS, Configs
    from tiny import write_chats

    folder = tmp_path_factory.mktemp("axolotl")
    write_chats(folder / "chats.jsonl", ROWS)
    return Configs(folder, tiny_llama)


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """`runs.Forks`: `axolotl` in forks of one process that has imported it."""
    from runs import Forks

    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def ivon_post() -> Cli:
    """`ivon-post`, run in this process."""
    return Cli()


@pytest.fixture(scope="module")
def held(ensemble: Path, tiny_llama: Path) -> Iterator[Any]:
    """A server of the module's `ensemble`: the mean and three draws."""
    from openai_server import MEMBERS, Server, serving

    with serving(Server(ensemble, tiny_llama, MEMBERS)) as served:
        yield served


@pytest.fixture
def server(held: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same server, as if it had not been asked yet."""
    held.reset()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return held
