"""`ivon-post serve`: from an adapter, or an ensemble, to what answers a server's requests."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..models.session import Loading, Session, load_tokenizer
from ..reporter import SILENT, Reporter

if TYPE_CHECKING:
    from ..data.encode import ChatFormat
    from ..decisions.recommendation import DecisionRule
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
    session = Session.open(posterior, loading, reporter)
    from ..data.chats import trained_choices
    from .local.engine import TokenEngine
    from .local.queue import Local

    if mean_rule is None:
        reporter.begin(f"drawing {drawing.samples} members")
    draws = {"samples": drawing.samples, "seed": drawing.seed}
    engine = TokenEngine(session, posterior, rule, name=name, mean_rule=mean_rule, **draws)
    # Prompts are encoded while another thread decodes, and a tokenizer is not for two threads.
    tokenize = partial(encode, copy.deepcopy(session.tokenizer), chat_format=session.chat_format)
    choose = partial(encode_labels, tokenize.args[0], chat_format=session.chat_format)
    labels = trained_choices(posterior.metadata)
    expected = (mean_rule or rule).mean_confidence
    return Local(engine, tokenize, limits, choose, labels, session.chat_format.system_prompt, expected)


def encode(
    tokenizer: Any,
    prompt: Any,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    chat_format: ChatFormat | None = None,
) -> Sequence[int]:
    """Return the tokens of a prompt: a text, token ids or the messages of a chat, with the request's own arguments."""
    from ..data.chats import Chat
    from ..data.encode import render

    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]  # type: ignore[no-any-return]
    if isinstance(prompt[0], int):
        return prompt  # type: ignore[no-any-return]
    chat = Chat(tuple(_messages(tokenizer, prompt)), None, "messages")
    return render(tokenizer, [chat], _format(chat_format, chat_template_kwargs))[0].ids


def _format(chat_format: ChatFormat | None, chat_template_kwargs: Mapping[str, Any] | None) -> ChatFormat:
    """Return how a chat is rendered: as all are, with the request's own arguments."""
    from ..data.encode import ChatFormat

    chat_format = chat_format or ChatFormat()
    if chat_template_kwargs is None:
        return chat_format
    chosen = ChatFormat.of({}, chat_template_kwargs)
    return replace(chosen, kwargs={**chat_format.kwargs, **chosen.kwargs})


def _messages(tokenizer: Any, prompt: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a chat; a developer is a system where the template knows no developer."""
    from ..data.chats import chat_messages

    messages = chat_messages({"messages": prompt}, "messages")
    if "developer" not in str(tokenizer.chat_template):
        messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    return messages


def encode_labels(
    tokenizer: Any,
    prompt: Any,
    labels: Sequence[str],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    chat_format: ChatFormat | None = None,
) -> EncodedExample:
    """Return the tokens of a prompt, and those of each label as its answer: see `encode`.

    Raises:
        IVONError: as `data.encode.encode`; the labels are fewer than two or alike; the prompt is no chat or text.
    """
    from ..data.chats import Example, find_choices
    from ..data.encode import common_length
    from ..data.encode import encode as encode_examples

    labels = find_choices((), labels)
    if isinstance(prompt, str):  # labels as they are, after the text
        rows = [tuple(tokenizer(prompt + label)["input_ids"]) for label in labels]
        begun = {row[:length] for row in rows for length in range(1, len(row))}
        rows = [(*row, tokenizer.eos_token_id) if row in begun else row for row in rows]
        start = common_length(rows)
        if start < 1 or len(set(rows)) < len(rows):
            raise IVONError("the prompt is empty, or the model reads two of the choices as the same")
        return EncodedExample(list(rows[0][:start]), [start - 1], [0], tuple(row[start:] for row in rows))
    if isinstance(prompt[0], int):
        raise IVONError("choices go with a text or a chat, not with tokens")
    example = Example(tuple(_messages(tokenizer, prompt)), labels[0], "messages")
    own = _format(chat_format, chat_template_kwargs)
    return encode_examples(tokenizer, [example], "choice", choices=labels, chat_format=own)[0]


def proxy_backend(
    folder: str,
    endpoints: Sequence[str],
    rule: DecisionRule,
    limits: Limits,
    combining: Combining,
    *,
    name: str | None = None,
    samples: int | None = None,
) -> Backend:
    """Return the backend that answers, under `name`, from servers that serve the members of an ensemble.

    Args:
        folder: the ensemble that `ivon-post sample --serve vllm` wrote.
        endpoints: the servers' addresses; each serves every member.
        samples: the first draws only; None: all.

    Raises IVONError if the folder is no ensemble, or a server does not answer or lacks a member.
    """
    from ..data.chats import trained_choices
    from ..data.encode import ChatFormat
    from ..generation.endpoint import Endpoint
    from ..generation.ensemble import Ensemble
    from ..generation.plan import Plan
    from .proxy.proxy import Proxy, Reading
    from .proxy.upstream import UpstreamPool

    name = served_name(name, folder)
    ensemble = Ensemble(folder)
    draws = ensemble.draws if samples is None else ensemble.members(Plan(n=samples, per_model=1))
    members = ["mean", *draws] if ensemble.has_mean else draws
    pool = UpstreamPool(endpoints, combining.concurrency, limits.timeout)
    chat_format = ChatFormat.of(ensemble.source)
    labels = trained_choices(ensemble.source)

    @functools.cache
    def tokenizer() -> Any:
        return load_tokenizer(ensemble.tokenizer_folder, ensemble.base_model)  # for choices alone

    def read(prompt: Any, labels: Sequence[str], kwargs: Mapping[str, Any] | None) -> EncodedExample:
        return encode_labels(tokenizer(), prompt, labels, kwargs, chat_format=chat_format)

    proxy = Proxy(pool, name, members, combining, rule, limits, Reading(read, labels, chat_format.system_prompt))
    for url in endpoints:
        Endpoint(url, _START_TIMEOUT).models(members)
    return proxy
