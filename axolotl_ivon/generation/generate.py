"""n-best lists for a file of prompts: from an adapter that is loaded here, or from an ensemble that a server serves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.chats import read_chats
from ..data.encode import render
from ..models.session import Loading, load_model, load_tokenizer
from ..posterior.adapter import mean_sha256
from ..posterior.posterior import Posterior, open_posterior
from ..storage.format import find_base_model
from .mbr import choose
from .nbest import NBestFile, check_file
from .plan import Engine, Output, Plan
from .uncertainty import by_answer, cluster_shares, is_below, measure, output_weights
from .utilities import AnswerExtractor


@dataclass(frozen=True)
class Generated:
    """What a run did.

    Attributes:
        prompts: how many prompts the file has outputs for.
        resumed: for how many of them an earlier run had made the outputs.
        tokens, seconds: what the others took, without the loading.
        abstained: on how many prompts not to answer.
    """

    prompts: int
    resumed: int
    tokens: int = 0
    seconds: float = 0.0
    abstained: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were generated in a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def generate(
    adapter: str,
    prompts: str | Path,
    output: str | Path,
    plan: Plan,
    *,
    tau: float = 1.0,
    prune_ratio: float = 0.0,
    limit: int | None = None,
    endpoint: str | None = None,
    concurrency: int = 32,
    timeout: float = 600.0,
    base_model: str | None = None,
    load_in: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    overwrite: bool = False,
    answer_regex: str | None = None,
    threshold: float | None = None,
    output_temperature: float = 1.0,
    begin: Callable[[str, int], Callable[[int], None]] = lambda doing, total: lambda count: None,
    count: Callable[[int], None] = lambda tokens: None,
    notify: Callable[[str], None] = lambda message: None,
) -> Generated:
    """Write the outputs that `plan` asks for, of every prompt, to a `NBestFile`, or those that it lacks.

    A line also says how sure the outputs are of their most frequent answer (`uncertainty.Uncertainty`).

    Args:
        adapter: folder or Hub id of the adapter; with `endpoint`, the folder of the ensemble that is served there.
        tau, prune_ratio: of the posterior that is drawn from; an ensemble has its own.
        limit: take the first prompts only.
        concurrency, timeout: as `EndpointEngine` has them.
        base_model, load_in, device, dtype: as `load_model` has them.
        batch_size: as `TransformersEngine` has it.
        answer_regex: finds the answer in an output, which is the whole text without it (`utilities.AnswerExtractor`).
        threshold: where fewer outputs than this share have the most frequent answer, the line says `"abstain": true`.
        output_temperature: of those shares (`uncertainty.measure`).
        begin: told what begins and how much of it there is (0: nobody knows); what it returns hears of every prompt.
        count: told how many tokens were generated so far.

    Raises:
        IVONError: the prompts, the adapter, the base model, the server or the output are not what they must be.
    """
    chats = read_chats(prompts, limit)
    if endpoint:
        from .endpoint import EndpointEngine
        from .ensemble import Ensemble

        ensemble = Ensemble(adapter)
        members = ensemble.members(plan)
        folder, base = Path(ensemble.tokenizer_folder), base_model or ensemble.base_model
        facts: dict[str, Any] = {"engine": "endpoint", "ensemble": ensemble.facts}
        doing = "asking the server for its models"

        def start() -> Engine:
            return EndpointEngine(endpoint, members, plan, concurrency=concurrency, timeout=timeout)
    else:
        posterior = drawn_posterior(adapter, plan, tau, prune_ratio)
        assert posterior.folder is not None
        folder = posterior.folder
        base = find_base_model(posterior.config, folder, base_model)
        facts = {
            "engine": "transformers",
            "adapter": posterior.metadata.get("mean_sha256") or mean_sha256(posterior.mean),
            "base_model": base,
            "load_in": load_in,
            "dtype": dtype,
            "tau": "inf" if plan.mean or math.isinf(posterior.tau) else posterior.tau,
            "prune_ratio": prune_ratio,
        }
        doing = "loading the base model"

        def start() -> Engine:
            from .local import TransformersEngine

            model = load_model(folder, Loading(base, load_in, device, dtype))
            return TransformersEngine(model, tokenizer, posterior, plan, batch_size=batch_size, notify=notify)

    answers = AnswerExtractor(answer_regex)
    facts["answer_regex"] = answer_regex
    facts["abstain"] = threshold if threshold is None else [threshold, output_temperature]
    settings = {**facts, **asdict(plan)}
    check_file(Path(output), settings, overwrite, filter(Path.is_dir, [Path(adapter)]))
    begin("loading the tokenizer", 0)  # and torch with it
    tokenizer = load_tokenizer(folder, base)
    rendered = render(tokenizer, chats)
    file = NBestFile(output, settings, rendered, overwrite)
    before, tokens = file.done, 0
    if before == len(rendered):
        return Generated(before, before, abstained=file.abstained)

    def known(outputs: Sequence[Output]) -> dict[str, Any]:
        members, clusters = [o.member for o in outputs], by_answer([answers(o.text) for o in outputs])
        shares = cluster_shares(clusters, output_weights(members))
        chosen = choose(shares, [-math.inf if o.logprob is None else o.logprob for o in outputs])
        found = asdict(measure(clusters, members, chosen, temperature=output_temperature))
        if threshold is not None:
            found["abstain"] = is_below(found["confidence"], threshold)
        return found

    def counted(new: int) -> None:
        nonlocal tokens
        tokens += new
        count(tokens)

    begin(doing, 0)
    engine = start()
    advance = begin("generating", len(rendered) - before)
    begun = time.monotonic()
    with closing(file):
        for prompt, outputs in zip(rendered[before:], engine.outputs(rendered, before, counted), strict=True):
            file.append(prompt, outputs, known(outputs))
            advance(1)
    return Generated(len(rendered), before, tokens, time.monotonic() - begun, file.abstained)


def drawn_posterior(adapter: str, plan: Plan, tau: float = 1.0, prune_ratio: float = 0.0) -> Posterior:
    """Return the posterior that `plan` draws from; the mean alone needs no σ."""
    if plan.mean and not prune_ratio:
        return open_posterior(adapter, mean_only=True)
    posterior = Posterior.from_pretrained(adapter)
    return (posterior.prune(prune_ratio) if prune_ratio else posterior).temper(tau)
