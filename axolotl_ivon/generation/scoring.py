"""Log-probabilities of given tokens under the members of an ensemble that vLLM serves: its `prompt_logprobs`.

A request has prompt and answer together as its prompt. vLLM returns, for every token of it but the first, the TOP
likeliest tokens in its place and the one that stands there: {"123": {"logprob": −0.7, "rank": 1, "decoded_token": …}}.
So the log-probability of each given token is exact, and of others there are the likeliest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.encode import ChatFormat, EncodedExample
from ..errors import IVONError, param_ref
from ..models.session import ChatReader, Loading, has_head, load_tokenizer
from ..posterior.adapter import mean_sha256
from ..posterior.posterior import Posterior, open_posterior
from ..reporter import SILENT, Reporter
from .endpoint import Endpoint, Result, in_order, together
from .ensemble import Ensemble

TOP = 20  # likeliest tokens to ask for, the most that vLLM gives unless told otherwise
_LEAST = -9999.0  # what vLLM writes for a probability of 0
Row = Mapping[int, float]  # log-probabilities by token
FetchRows = Callable[[Sequence[int]], Awaitable[list[Row]]]  # of tokens: the row in the place of each but the first


def scoring_request(model: str, ids: Sequence[int]) -> dict[str, Any]:
    """Return the body of a request for the log-probabilities of tokens."""
    # vLLM generates at least one token, which nobody reads.
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}


def read_rows(prompt_logprobs: Any, ids: Sequence[int]) -> list[Row]:
    """Return the rows in an answer to such a request; raise ValueError, TypeError or AttributeError if it is none."""
    rows: list[Row] = []
    for token, entries in zip(ids[1:], prompt_logprobs[1:], strict=True):
        row = {int(key): max(float(entry["logprob"]), _LEAST) for key, entry in entries.items()}
        if token not in row or not all(map(math.isfinite, row.values())):
            raise ValueError
        rows.append(row)
    return rows


async def label_logprobs(
    ask: FetchRows, ids: Sequence[int], labels: Sequence[tuple[int, ...]], by_length: bool = False
) -> list[float]:
    """Return Σ log p(token | before) of each label's tokens after the prompt `ids`, or their mean (`by_length`).

    A label that differs only in tokens which the rows of another have needs no request of its own.
    """
    known: dict[tuple[tuple[int, ...], int], float] = {}
    scores = []
    for label in labels:
        steps = [(label[:place], label[place]) for place in range(len(label))]
        if any(step not in known for step in steps):
            rows = (await ask([*ids, *label]))[len(ids) - 1 :]
            for (before, _), row in zip(steps, rows, strict=True):
                known.update({(before, token): logprob for token, logprob in row.items()})
        total = math.fsum(known[step] for step in steps)
        scores.append(total / len(steps) if by_length else total)
    return scores


class ServedMembers:
    """The members of an ensemble's folder on vLLM servers, each of which serves all of them.

    Args:
        folder: the ensemble that `ivon-post sample` wrote.
        endpoints: the servers' addresses.
        loading: the base model that has the tokenizer where the adapter that was drawn from is gone; and arguments of
            the chat template.
        samples: the first draws only; None: all.
        concurrency: requests at a time to each server.

    Attributes:
        posterior: the adapter of the first member, with the header of the posterior that members were drawn from.
        base_model: the name of the base model.
        draws: the names of the members that are draws.
        reader: turns chats into tokens; known after `start`.

    Raises:
        IVONError: the folder is no ensemble or has too few draws, or `openai` is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        endpoints: Sequence[str],
        loading: Loading = Loading(),
        samples: int | None = None,
        concurrency: int = 32,
    ) -> None:
        self._ensemble = ensemble = Ensemble(folder)
        self._endpoints, self._concurrency = [Endpoint(url) for url in endpoints], concurrency
        self.base_model = loading.base_model or ensemble.base_model
        self.draws: list[str] = ensemble.first(samples)
        self._has_base, self._base_name = False, ensemble.base_model
        header = {name: str(value) for name, value in ensemble.source.items()}
        self.chat_format = ChatFormat.of(header, loading.chat_template_kwargs)
        first = open_posterior(ensemble.folder / ("mean" if ensemble.has_mean else self.draws[0]), mean_only=True)
        if has_head(first):
            raise IVONError(f"{param_ref('endpoint')}: vLLM serves no classification head; leave it out")
        # The mean's fingerprint is that of the adapter that was drawn from, unless its weights were pruned or rounded.
        known = {"mean_sha256": mean_sha256(first.mean)} if ensemble.has_mean else {}
        self.posterior: Posterior = replace(first, metadata={**header, **known})

    def start(self, reporter: Reporter = SILENT) -> None:
        """Ask the servers for their models, and load the tokenizer.

        Raises:
            IVONError: no server answers at an address, or it lacks a member; there is no tokenizer.
        """
        reporter.begin("asking the server for its models")
        members = [*(["mean"] if self._ensemble.has_mean else []), *self.draws]
        served = [endpoint.models(members) for endpoint in self._endpoints]
        names = [name for name, model in served[0].items() if self._base_name in (name, getattr(model, "root", None))]
        self._has_base = any(all(name in models for models in served) for name in names)
        self._base_name = next(iter(names), self._base_name)
        lengths = [getattr(model, "max_model_len", None) for models in served for model in models.values()]
        # The last token of an answer is only predicted in memory, and is part of the prompt there; then vLLM adds one.
        known = [length - 2 for length in lengths if isinstance(length, int)]
        tokenizer = load_tokenizer(self._ensemble.tokenizer_folder, self.base_model)
        self.reader = ChatReader(tokenizer, self.chat_format, min(known, default=None))

    def model(self, kind: str) -> str:
        """Return the name under which "base" or "mean" is served."""
        return "mean" if kind == "mean" else self._base_name

    def lacks(self, kind: str) -> str:
        """Return why "base" or "mean" is not served; empty if it is."""
        if kind == "base":
            return "" if self._has_base else f"no server has it as {self._base_name}"
        has_mean = self._ensemble.has_mean
        return "" if has_mean else f"{self._ensemble.folder} has none; draw it with `ivon-post sample --include-mean`"

    def labels(self, items: Sequence[EncodedExample], models: Sequence[str]) -> Iterator[list[list[float]]]:
        """Yield for each item, of each model, the log-likelihood of each label: see `label_logprobs`."""

        async def score(ask: FetchRows, item: EncodedExample) -> list[float]:
            return await label_logprobs(ask, item.ids, item.candidates or (), item.by_length)

        return self._scores(items, models, score)

    def answers(self, items: Sequence[EncodedExample], models: Sequence[str]) -> Iterator[list[list[Row]]]:
        """Yield for each item, of each model, the rows at the scored positions of its answer."""

        async def score(ask: FetchRows, item: EncodedExample) -> list[Row]:
            rows = await ask([*item.ids, item.targets[-1]])
            return [rows[position] for position in item.positions]

        return self._scores(items, models, score)

    def _scores(
        self,
        items: Sequence[EncodedExample],
        models: Sequence[str],
        score: Callable[[FetchRows, EncodedExample], Coroutine[Any, Any, Result]],
    ) -> Iterator[list[Result]]:
        """Yield for each item the score under each of the models.

        Raises:
            IVONError: a server fails, refuses a request, or answers without `prompt_logprobs`.
        """
        clients = [endpoint.client() for endpoint in self._endpoints]
        gates, asked = [asyncio.Semaphore(self._concurrency) for _ in clients], [0] * len(clients)

        async def rows(model: str, ids: Sequence[int]) -> list[Row]:
            number = asked.index(min(asked))  # the server with the fewest requests, those that wait included
            endpoint, body = self._endpoints[number], scoring_request(model, ids)
            extra = {"prompt_logprobs": body.pop("prompt_logprobs")}

            def read(choices: Any) -> list[Row]:
                if (answered := getattr(choices[0], "prompt_logprobs", None)) is None:
                    raise IVONError(f"{endpoint.name} returns no prompt_logprobs; use vLLM")
                return read_rows(answered, ids)

            asked[number] += 1
            try:
                async with gates[number]:
                    return await endpoint.complete(clients[number], read, **body, extra_body=extra)
            finally:
                asked[number] -= 1

        async def scored(item: EncodedExample) -> list[Result]:
            return await together([score(functools.partial(rows, model), item) for model in models])

        ahead = -(-2 * self._concurrency * len(clients) // len(models))
        with contextlib.closing(in_order(map(scored, items), ahead, clients)) as results:
            yield from results
