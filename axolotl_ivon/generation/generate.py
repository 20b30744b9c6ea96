"""n-best lists for chats: from an adapter that is loaded here, or from an ensemble that a server serves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.chats import Example
from ..data.encode import ChatFormat, render
from ..metrics.selective import is_below
from ..models.session import Loading, Session, check_writes, load_tokenizer
from ..posterior.adapter import UNPRUNED, mean_sha256
from ..posterior.posterior import Posterior, open_posterior
from ..reporter import SILENT, Reporter
from ..storage.format import find_base_model
from .ensemble import Ensemble
from .mbr import choose
from .nbest import NBestFile
from .plan import Engine, Output, Plan
from .uncertainty import by_answer, cluster_shares, measure
from .utilities import AnswerExtractor


@dataclass(frozen=True)
class Source:
    """Where outputs come from, before a model is loaded or a server asked."""

    plan: Plan  # what is generated for every prompt
    folder: Path  # of the adapter or ensemble; nothing is written into it
    tokenizer_folder: Path
    base_model: str  # has the tokenizer if that folder has none
    settings: dict[str, Any]  # what the outputs depend on, apart from the plan and the prompts
    start: Callable[[Reporter], Engine]  # loads the model, or asks the server for its models
    chat_format: ChatFormat  # how prompts are rendered


def loaded_draws(
    adapter: str,
    plan: Plan,
    tau: float = 1.0,
    prune_ratio: float = 0.0,
    loading: Loading = Loading(),
) -> Source:
    """Return draws from the posterior of an adapter (a folder or Hub id), which is to be loaded here.

    An adapter that cannot be read, writes no text, has no σ where the plan draws, or names no base model is an
    IVONError.
    """
    mean_only = plan.mean and not prune_ratio
    posterior = open_posterior(adapter, mean_only=True) if mean_only else Posterior.from_pretrained(adapter)
    check_writes(posterior)
    sigma = posterior.sigma
    posterior = posterior.prune(prune_ratio).temper(tau)
    assert posterior.folder is not None, "it was read from a folder"
    base_model = find_base_model(posterior.config, posterior.folder, loading.base_model)

    def start(reporter: Reporter) -> Engine:
        from .local import TransformersEngine

        session = Session.open(posterior, loading, reporter)
        return TransformersEngine(session, posterior, plan, reporter=reporter)

    settings = {
        "engine": "transformers",
        "adapter": posterior.metadata.get("mean_sha256") or mean_sha256(posterior.mean),
        "base_model": base_model,
        "load_in": loading.load_in,
        "dtype": loading.dtype,
        "tau": "inf" if plan.mean or math.isinf(posterior.tau) else posterior.tau,
        "prune_ratio": prune_ratio,
    }
    if UNPRUNED in posterior.metadata:
        settings[UNPRUNED] = posterior.metadata[UNPRUNED]
    if prune_ratio or settings["tau"] != "inf":
        settings["sigma"] = mean_sha256(sigma)
    chat_format = ChatFormat.of(posterior.metadata, loading.chat_template_kwargs)
    return Source(plan, posterior.folder, posterior.folder, base_model, settings, start, chat_format)


def served_draws(
    folder: str,
    plan: Plan,
    endpoint: str,
    base_model: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Source:
    """Return the members of an ensemble's folder, which an OpenAI-compatible server serves.

    `base_model` (by default the ensemble's) has the tokenizer if the adapter that was drawn from is gone. A folder that
    is no ensemble, or has too few members for the plan, is an IVONError.
    """
    ensemble = Ensemble(folder)
    members = ensemble.members(plan)

    def start(reporter: Reporter) -> Engine:
        from .endpoint import EndpointEngine

        reporter.begin("asking the server for its models")
        return EndpointEngine(endpoint, members, plan)

    settings = {"engine": "endpoint", "ensemble": ensemble.source}
    tokenizer_folder = Path(ensemble.tokenizer_folder)
    chat_format = ChatFormat.of(ensemble.source, chat_template_kwargs)
    base_model = base_model or ensemble.base_model
    return Source(plan, ensemble.folder, tokenizer_folder, base_model, settings, start, chat_format)


@dataclass(frozen=True)
class AnswerRule:
    """How the answer in an output is found, and how sure the outputs of a prompt must be of it."""

    answers: AnswerExtractor = field(default_factory=AnswerExtractor)
    threshold: float | None = None  # abstain where fewer outputs than this share have the most frequent answer
    temperature: float = 1.0  # of these shares (`uncertainty.measure`)

    def judge(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """Return how sure the outputs of a prompt are of their most frequent answer (`uncertainty.Uncertainty`).

        With a threshold, `abstain` says whether that is too little.
        """
        members, clusters = [o.member for o in outputs], by_answer([self.answers(o.text) for o in outputs])
        chosen = choose(cluster_shares(clusters), [-math.inf if o.logprob is None else o.logprob for o in outputs])
        judged = asdict(measure(clusters, members, chosen, self.temperature))
        if self.threshold is not None:
            judged["abstain"] = is_below(judged["confidence"], self.threshold)
        return judged


@dataclass(frozen=True)
class Generated:
    """The counts of a run."""

    prompts: int  # that the file has outputs for
    resumed: int  # whose outputs an earlier run had made
    tokens: int = 0  # of the others
    seconds: float = 0.0  # for these, without the loading
    abstained: int = 0  # prompts that should not be answered

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were generated in a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def speed_text(tokens_per_second: float) -> str:
    """Return a speed in words, which is not 0 while anything is generated."""
    return f"{'<1' if tokens_per_second < 1 else f'{tokens_per_second:.0f}'} tokens/s"


def generate(
    source: Source,
    chats: Sequence[Example],
    output: str | Path,
    rule: AnswerRule = AnswerRule(),
    *,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Generated:
    """Write the outputs of every chat's prompt to a `NBestFile`, or those that it lacks.

    A line also says what `rule` judges of its outputs.

    Raises:
        IVONError: the file was made with other settings or prompts, or the prompts, the model or the server do not fit.
    """
    abstain = None if rule.threshold is None else [rule.threshold, rule.temperature]
    settings = {**source.settings, "answer_regex": rule.answers.pattern, "abstain": abstain, **asdict(source.plan)}
    file = NBestFile(output, settings, overwrite, [source.folder])
    reporter.begin("loading the tokenizer")  # and torch with it
    prompts = render(load_tokenizer(source.tokenizer_folder, source.base_model), chats, source.chat_format)
    resumed, tokens = file.resume(prompts), 0
    if resumed == len(prompts):
        return Generated(resumed, resumed, abstained=file.abstained)
    engine = source.start(reporter)
    advance = reporter.begin("generating", len(prompts) - resumed)
    begun = time.monotonic()
    with closing(file):
        for prompt, outputs in zip(prompts[resumed:], engine.outputs(prompts, resumed), strict=True):
            file.append(prompt, outputs, rule.judge(outputs))
            # Of a member's outputs, as many as are `distinct` were generated; greedy copies are of one length.
            tokens += sum(output.tokens for output in outputs) * source.plan.distinct // source.plan.per_member
            speed = tokens / max(time.monotonic() - begun, 1e-9)
            reporter.describe("generating", f"generating, {speed_text(speed)}")
            advance(1)
    return Generated(len(prompts), resumed, tokens, time.monotonic() - begun, file.abstained)
