"""`ivon-post serve`: from an adapter to a server."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref

if TYPE_CHECKING:
    from .backend import Backend, Limits
    from .proxy.upstream import Choose

_NEEDED = ("starlette", "uvicorn", "prometheus_client", "aiohttp")
COMBINATIONS = ("mbr", "rescore")
_START_TIMEOUT = 10.0  # seconds for a server to name its models
KEY_VARIABLE = "IVON_API_KEY"


@dataclass(frozen=True)
class Address:
    """Where to listen, and for whom.

    Raises:
        IVONError: it would be open to others without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None

    def __post_init__(self) -> None:
        from .api.http import is_loopback

        if self.api_key == "":
            raise IVONError(f"{param_ref('api_key')} '': an empty key keeps nobody out; leave it out or choose one")
        if self.api_key is None and not is_loopback(self.host):
            raise IVONError(
                f"{param_ref('host')} {self.host}: others can reach it; set a key with {param_ref('api_key')} or "
                f"{KEY_VARIABLE}, or stay with 127.0.0.1"
            )


def check_packages() -> None:
    """Raise IVONError if what the server is made of is not installed."""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise IVONError(f"the server needs the package {name}: pip install 'axolotl-ivon[serve]'")


def check_name(name: str) -> str:
    """Return a name that a model can be served under; raise IVONError if it cannot."""
    if not name or ":" in name or not name.isprintable():
        raise IVONError(f"{param_ref('name')} {name!r}: a model's name is not empty and has no ':' in it")
    return name


def local_backend(
    adapter: str,
    limits: Limits,
    *,
    name: str | None = None,
    samples: int = 8,
    seed: int = 0,
    tau: float = 1.0,
    prune_ratio: float = 0.0,
    temperature: float = 1.0,
    threshold: float | None = None,
    base_model: str | None = None,
    load_in: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    begin: Callable[[str, int], object] = lambda doing, total: None,
) -> Backend:
    """Return what answers from draws of an adapter's posterior, with the base model in memory here.

    Args:
        adapter: folder or Hub id.
        name: of the average; the adapter's own by default.
        samples, seed: how many draws, those of `ivon-post sample` with this seed.
        tau, prune_ratio: of the posterior that is drawn from.
        temperature, threshold: of the confidence (`evaluation.sweep.Decision`).
        base_model, load_in, device, dtype: as `load_model` has them.
        begin: told what begins.

    Raises:
        IVONError: the adapter or the base model is not what it must be.
    """
    from ..data.chats import Chat
    from ..models.session import Loading, load_model, load_tokenizer
    from ..posterior.posterior import Posterior
    from ..storage.format import find_base_model
    from .backend import Local

    posterior = Posterior.from_pretrained(adapter)
    posterior = (posterior.prune(prune_ratio) if prune_ratio else posterior).temper(tau)
    folder = posterior.folder
    assert folder is not None
    base = find_base_model(posterior.config, folder, base_model)
    name = check_name(name if name is not None else Path(adapter).resolve().name)
    begin("loading the base model", 0)
    from ..data.encode import render
    from .local.engine import Engine, out_of_memory

    tokenizer = load_tokenizer(folder, base)
    model = load_model(folder, Loading(base, load_in, device, dtype))
    begin(f"drawing {samples} members", 0)
    engine = Engine(
        model,
        tokenizer,
        posterior,
        name=name,
        samples=samples,
        seed=seed,
        temperature=temperature,
        threshold=threshold,
    )
    # Prompts are encoded while another thread decodes, and a tokenizer is not for two threads.
    encoder: Any = copy.deepcopy(tokenizer)

    def chat(messages: list[dict[str, str]]) -> Sequence[int]:
        return render(encoder, [Chat(tuple(messages), None, "messages")])[0].ids

    return Local(engine, chat, lambda text: encoder(text)["input_ids"], limits, out_of_memory)


def upstream_backend(
    ensemble: str,
    endpoints: Sequence[str],
    limits: Limits,
    *,
    name: str | None = None,
    samples: int | None = None,
    combine: str = "mbr",
    candidates: int = 4,
    concurrency: int = 256,
    utility: str = "exact",
    answer_regex: str | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
) -> Backend:
    """Return what answers from servers that serve the members of an ensemble.

    Args:
        ensemble: the folder that `ivon-post sample --serve vllm` wrote.
        endpoints: the servers' addresses; each serves every member.
        samples: the first draws only.
        combine: one of COMBINATIONS (`combine`).
        candidates: how many answers every member gives.
        concurrency: requests at a time to each server.
        utility, answer_regex: of "mbr" (`generation.utilities`).
        temperature, threshold: of the confidence.

    Raises:
        IVONError: the folder is no ensemble, or a server does not answer or lacks a member.
    """
    from ..generation.endpoint import EndpointEngine
    from ..generation.ensemble import Ensemble
    from ..generation.plan import Plan
    from ..generation.utilities import UTILITIES, AnswerExtractor
    from .proxy.mixture import by_risk
    from .proxy.upstream import Upstreams

    held = Ensemble(ensemble)
    members = held.draws if samples is None else held.members(Plan(n=samples, per_model=1))
    name = check_name(name if name is not None else Path(ensemble).resolve().name)
    choose: Choose | None = None
    if combine == "mbr":
        answers = AnswerExtractor(answer_regex)
        choose = functools.partial(
            by_risk, utility=UTILITIES[utility](answers), answers=answers, temperature=temperature, threshold=threshold
        )
    for url in endpoints:
        # It asks the server for its models.
        EndpointEngine(url, [*members, *(["mean"] if held.has_mean else [])], Plan(), timeout=_START_TIMEOUT)
    return Upstreams(
        endpoints,
        members,
        name=name,
        limits=limits,
        mean="mean" if held.has_mean else None,
        choose=choose,
        candidates=candidates,
        concurrency=concurrency,
        threshold=threshold,
    )
