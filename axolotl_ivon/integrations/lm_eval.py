"""The model class `ivon-posterior` of lm-evaluation-harness (extra `lm-eval`): likelihoods averaged over draws.

From the command line, where every option of `lm_eval` works:

    python -m axolotl_ivon.lm_eval --model ivon-posterior --model_args adapter=adapter/,samples=10 --tasks arc_easy

The harness looks for no extensions by itself, so this module registers the class and hands over to it. From Python,
importing the module is enough: `lm_eval.simple_evaluate(model="ivon-posterior", model_args=…)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

import torch
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..decisions.recommendation import recommended_for
from ..evaluation.variants import Variant
from ..metrics.scores import entropy
from ..models.session import Loading, Session
from ..posterior.posterior import open_posterior

_T = TypeVar("_T")


@register_model("ivon-posterior")
class IVONPosterior(HFLM):
    """A posterior as the harness sees a language model.

    log p(y|x) = log mean_k p(y|x, θ_k), over whole continuations and documents: the predictive distribution of the
    posterior. A continuation counts as greedy if it is for more than half of the draws. Text is generated from the
    mean. Where a task has choices, the mutual information between choice and draw, in nats, says how far the draws
    disagree: its mean over the documents is in the results as `config.mutual_information`, by task.

    Args:
        adapter: folder or Hub id of the adapter.
        samples, tau, ratio, seed: as in `ivon-post eval`; `tau=inf` is the mean alone.
        recommended: a recommended.json, in place of `tau` and `ratio`; the adapter's own is taken only if it is named,
            so that results depend on the arguments alone.
        options: base_model, load_in, device and dtype, as in `Loading`, and further arguments of the harness's class
            `hf` (batch_size, max_length, add_bos_token, …).

    Raises:
        IVONError: as `open_posterior` and `Session.open` do.
    """

    cache_hook: Any

    def __init__(
        self,
        adapter: str,
        samples: int = 10,
        tau: float | str = 1.0,
        ratio: float = 0.0,
        seed: int = 0,
        recommended: str | None = None,
        **options: Any,
    ) -> None:
        if recommended is not None:
            taken = recommended_for(adapter, recommended)
            assert taken is not None
            tau, ratio = taken.tau, taken.ratio
        variant = Variant("posterior", tau=float(tau), ratio=float(ratio))
        # The harness's command line says cuda:0 when it was told nothing, GPU or not.
        device = options.pop("device", None) or "auto"
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "auto"
        loading = {field.name: options.pop(field.name) for field in fields(Loading) if field.name in options}
        posterior = open_posterior(adapter, mean_only=not variant.needs_sigma)
        session = Session.open(posterior, Loading(**loading, device=device))
        pruned = posterior.prune(variant.ratio)
        self._slots = session.slots
        self._slots.write(pruned.mean)
        self._posterior, self._seed = pruned.temper(variant.tau), int(seed)
        self._draws = variant.passes(int(samples))
        self._disagreement: dict[tuple[str, int], float] = {}  # (task, document) -> mutual information
        super().__init__(pretrained=session.model, tokenizer=session.tokenizer, **options)

    def _per_draw(self, run: Callable[[], _T]) -> Iterator[_T]:
        """Yield what `run` returns at each draw; the harness's cache sees none of it."""
        hook = self.cache_hook
        self.cache_hook = CacheHook(None)
        try:
            for member in range(self._draws):
                with self._slots.loaded(self._posterior.sample(self._seed, member)):
                    yield run()
        finally:
            self.cache_hook = hook

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is it greedy) of every (context, continuation)."""
        draws = list(self._per_draw(lambda: super(IVONPosterior, self).loglikelihood(requests, disable_tqdm)))
        values = [[value for value, _ in draw] for draw in draws]
        self._note_disagreement(requests, values)
        greedy = [2 * sum(flags) > len(draws) for flags in zip(*([flag for _, flag in d] for d in draws), strict=True)]
        return self._cached("loglikelihood", requests, list(zip(_log_mean(values), greedy, strict=True)))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of every document."""
        draws = list(self._per_draw(lambda: super(IVONPosterior, self).loglikelihood_rolling(requests, disable_tqdm)))
        return self._cached("loglikelihood_rolling", requests, _log_mean(draws))

    def _cached(self, kind: str, requests: list[Any], answers: list[_T]) -> list[_T]:
        """Let the harness's cache have the answers, and return them."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    def _note_disagreement(self, requests: list[Any], values: list[list[float]]) -> None:
        """Keep the mutual information of every document that has choices, from the draws' `values` of its requests."""
        if self._draws == 1:
            return
        documents: dict[tuple[str, int], dict[int, int]] = {}
        for place, request in enumerate(requests):
            if getattr(request, "task_name", None) is not None:
                documents.setdefault((request.task_name, request.doc_id), {})[request.idx] = place
        draws = torch.tensor(values, dtype=torch.float64)
        for document, places in documents.items():
            # Some tasks ask for every choice without its question, too (acc_mutual_info).
            asked = [place for place in places.values() if requests[place].args[0]] or list(places.values())
            if len(asked) > 1:
                choices = draws[:, asked].softmax(1)
                self._disagreement[document] = (entropy(choices.mean(0)) - entropy(choices).mean()).item()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes about the model, and the mutual information of each task with choices."""
        tasks: dict[str, list[float]] = {}
        for (task, _), value in self._disagreement.items():
            tasks.setdefault(task, []).append(value)
        means = {task: {"mean": sum(values) / len(values), "documents": len(values)} for task, values in tasks.items()}
        return {**super().get_model_info(), "mutual_information": means}


def _log_mean(values: list[list[float]]) -> list[float]:
    """Return log mean_k exp(values[k][i]) for every i."""
    draws = torch.tensor(values, dtype=torch.float64)
    return (draws.logsumexp(0) - math.log(len(values))).tolist()
