"""`ivon-post serve`: from an adapter, or an ensemble, to what answers a server's requests."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import IVONError, param_ref
from ..models.session import Loading, Session, check_writes, load_tokenizer
from ..reporter import SILENT, Reporter

if TYPE_CHECKING:
    from ..decisions.rule import DecisionRule
    from .api.backend import Backend, Limits
    from .proxy.proxy import Combining

_START_TIMEOUT = 10.0  # seconds for a server to list its models
KEY_VARIABLE = "IVON_API_KEY"


@dataclass(frozen=True)
class Drawing:
    """The draws that answer from memory, which are those of `ivon-post sample` with the same seed."""

    adapter: str  # folder or Hub id
    samples: int = 8
    seed: int = 0
    tau: float = 1.0
    prune_ratio: float = 0.0


def check_key(host: str, api_key: str | None) -> None:
    """Raise IVONError if others could reach a server at `host` without a key."""
    from .api.http import is_loopback

    if api_key == "":
        raise IVONError(f"{KEY_VARIABLE} is empty: an empty key keeps nobody out; unset it or choose one")
    if api_key is None and not is_loopback(host):
        raise IVONError(
            f"{param_ref('host')} {host}: others can reach it; set a key with {KEY_VARIABLE}, or stay with 127.0.0.1"
        )


def check_packages() -> None:
    """Raise IVONError if a package that the server needs is not installed."""
    for name in ("starlette", "uvicorn", "prometheus_client", "aiohttp"):
        if importlib.util.find_spec(name) is None:
            raise IVONError(f"the server needs the package {name}: pip install 'axolotl-ivon[serve]'")


def served_name(name: str | None, folder: str) -> str:
    """Return the name of a model, by default that of its folder; raise IVONError if no model can have it."""
    name = name if name is not None else Path(folder).resolve().name
    if not name or ":" in name or not name.isprintable():
        raise IVONError(f"{param_ref('name')} {name!r}: a model's name is not empty and has no ':' in it")
    return name


def local_backend(
    drawing: Drawing,
    rule: DecisionRule,
    limits: Limits,
    loading: Loading,
    *,
    name: str | None = None,
    mean_rule: DecisionRule | None = None,
    reporter: Reporter = SILENT,
) -> Backend:
    """Return the backend that answers from draws of a posterior, with the base model in memory, under `name`.

    With `mean_rule` the mean answers under it.
    """
    from ..posterior.posterior import Posterior

    name = served_name(name, drawing.adapter)
    posterior = Posterior.from_pretrained(drawing.adapter)
    posterior = posterior.prune(drawing.prune_ratio).temper(drawing.tau)
    check_writes(posterior)
    session = Session.open(posterior, loading, reporter)
    from ..data.chats import trained_choices
    from .api.prompts import PromptReader
    from .local.engine import TokenEngine
    from .local.queue import Local

    if mean_rule is None:
        reporter.begin(f"drawing {drawing.samples} members")
    draws = {"samples": drawing.samples, "seed": drawing.seed}
    engine = TokenEngine(session, posterior, rule, name=name, mean_rule=mean_rule, **draws)
    # Prompts are encoded while another thread decodes, and a tokenizer is not for two threads.
    tokenizer, labels = copy.deepcopy(session.tokenizer), trained_choices(posterior.metadata)
    prompts = PromptReader(lambda: tokenizer, session.chat_format, labels, engine.check)
    return Local(engine, prompts, limits, (mean_rule or rule).mean_confidence)


def proxy_backend(
    folder: str,
    endpoints: Sequence[str],
    rule: DecisionRule,
    limits: Limits,
    combining: Combining,
    *,
    name: str | None = None,
    samples: int | None = None,
    mean_rule: DecisionRule | None = None,
) -> Backend:
    """Return the backend that answers, under `name`, from servers that serve the members of an ensemble.

    Args:
        folder: the ensemble that `ivon-post sample --serve vllm` wrote.
        endpoints: the servers' addresses; each serves every member.
        samples: the first draws only; None: all.
        mean_rule: with it the mean answers under it.

    Raises IVONError if the folder is no ensemble, or has no mean that is to answer, or a server does not answer or
    lacks a member.
    """
    from ..data.chats import trained_choices
    from ..data.encode import ChatFormat
    from ..generation.endpoint import Endpoint
    from ..generation.ensemble import Ensemble
    from .api.prompts import PromptReader
    from .proxy.proxy import Proxy
    from .proxy.upstream import UpstreamPool

    name = served_name(name, folder)
    ensemble = Ensemble(folder)
    if mean_rule is not None and not ensemble.has_mean:
        raise IVONError(
            f"{param_ref('recommended')}: the mean is recommended, and {folder} has none; have `ivon-post sample` "
            f"include the mean, or let the draws answer with {param_ref('samples')}"
        )
    draws = ensemble.first(samples)
    members = ["mean", *draws] if ensemble.has_mean else draws
    pool = UpstreamPool(endpoints, combining.concurrency, limits.timeout)
    tokenizer = partial(load_tokenizer, ensemble.tokenizer_folder, ensemble.base_model)  # for choices alone
    prompts = PromptReader(tokenizer, ChatFormat.of(ensemble.source), trained_choices(ensemble.source))
    proxy = Proxy(pool, name, members, combining, rule, limits, prompts, mean_rule)
    for url in endpoints:
        Endpoint(url, _START_TIMEOUT).models(members)
    return proxy
