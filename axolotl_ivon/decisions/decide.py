"""Decisions: for each text the probability of every label, and whether that is enough to answer.

`predict` is the one call for it; `Decider` keeps the model in memory between calls. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import Example, Message, find_choices, question_of, trained_choices
from ..errors import IVONError, param_ref
from ..evaluation.evaluate import KeptDraws, Sampling, evaluate
from ..evaluation.variants import Variant
from ..metrics.selective import is_below
from ..models.session import Loading, Session, has_head
from ..posterior.adapter import Adapter, mean_sha256
from ..posterior.posterior import Posterior, open_posterior
from ..records.decision import Decision
from ..reporter import SILENT, Reporter
from .conformal import labels_in_set
from .recommendation import recommended_for
from .rule import DecisionRule

if TYPE_CHECKING:
    from ..evaluation.served import ServedModel
    from ..metrics.scores import Scores

_FIRST_WINDOW, _LARGEST_WINDOW = 16, 1024  # texts that are decided together: few at first, so that answers come soon


class Decider:
    """A posterior over its base model in memory, which gives each text a probability for every label.

    Args:
        adapter: a folder or Hub id, or a `Posterior` that was read from one.
        choices: the labels; by default those of training, or those of the classification head.
        rule: the softmax temperature of the probabilities, the threshold below which to abstain, and prediction sets.
        sampling: how many draws are averaged.
        served: members of an ensemble on servers, in place of a model in memory.
        tau, ratio: temperature of the posterior and pruning ratio, on top of its own. At τ = ∞ it is the mean, one
            pass; None is 1, or the mean of an adapter without σ.

    Attributes:
        choices: the labels, in the order of the probabilities.
        passes: how many passes over the texts a decision takes.
        settings: what the decisions depend on, as JSON holds it.

    Raises:
        IVONError: the adapter cannot be read; the labels are fewer than two, alike, or not known; the threshold is
            outside [0, 1]; or as `Session.open` does.
    """

    def __init__(
        self,
        adapter: Posterior | str | os.PathLike[str],
        choices: Sequence[str] | None = None,
        rule: DecisionRule = DecisionRule(),
        sampling: Sampling = Sampling(),
        *,
        tau: float | None = None,
        ratio: float = 0.0,
        loading: Loading = Loading(),
        reporter: Reporter = SILENT,
        served: ServedModel | None = None,
    ) -> None:
        if rule.threshold is not None and rule.score != "probability":
            reporter.notify(f"the recommended threshold was found for the {rule.score} of outputs, so it is not used")
            rule = replace(rule, threshold=None)
        if rule.threshold is not None and not 0 <= rule.threshold <= 1:
            raise IVONError(f"{param_ref('threshold')} {rule.threshold:g} is outside [0, 1]; it is a probability")
        if served is not None:
            posterior = served.members.posterior
        elif isinstance(adapter, Posterior):
            posterior = adapter
        else:
            tau = tau if tau is not None else 1.0 if Adapter(adapter).sigma is not None else math.inf
            posterior = open_posterior(Path(adapter), mean_only=math.isinf(tau) and not ratio)
        self._lock = threading.Lock()
        self.choices = _choices(posterior, choices)
        self._task = "classify" if has_head(posterior) else "choice"
        self._rule = rule
        drawn = Variant("draws", tau=1.0 if tau is None else tau, ratio=ratio)
        self._variants = [drawn, replace(drawn, temperature=rule.temperature)]
        self.passes = drawn.passes(sampling.samples)
        if served is not None:
            served.members.start(reporter)
            self._reader, base_model = served.members.reader, served.members.base_model
            self._evaluate: Callable[..., list[Scores]] = functools.partial(served.evaluate, task="choice")
        else:
            session = Session.open(posterior, loading, reporter)
            self._reader, base_model = session, session.base_model
            from ..models.draws import Stack

            with contextlib.suppress(IVONError):  # else one draw runs after another
                Stack(session.model, [dict(posterior.mean)])
                sampling = replace(sampling, draws_per_pass=self.passes)
            kept: KeptDraws = {}
            self._evaluate = functools.partial(
                evaluate, session.model, posterior, task=self._task, sampling=sampling, kept=kept
            )
        self.choices = self.choices or self._reader.labels
        self.settings: dict[str, Any] = {
            "adapter": posterior.metadata.get("mean_sha256") or mean_sha256(posterior.mean),
            "base_model": base_model,
            "load_in": loading.load_in,
            "dtype": loading.dtype,
            "chat_template": dict(self._reader.chat_format.kwargs),
            "choices": list(self.choices),
            "by_length": rule.by_length,
            "tau": "inf" if math.isinf(tau := drawn.tau * posterior.tau) else tau,
            "ratio": ratio,
            "samples": self.passes,
            "seed": sampling.seed,
            "temperature": rule.temperature,
            "threshold": rule.threshold,
            "set": rule.prediction_set and rule.prediction_set.dump(),
        }
        if served is None and (ratio or self.settings["tau"] != "inf"):
            self.settings["sigma"] = mean_sha256(posterior.sigma)

    def __call__(
        self, texts: Sequence[str | Sequence[Message] | Example], reporter: Reporter = SILENT
    ) -> list[Decision]:
        """Return a decision for each text: what a user says, the messages of a chat before the answer, or an example.

        A text alone is asked after the system prompt of the training data, where there was one.

        Raises:
            IVONError: a text is empty or too long, or the chat template refuses it.
        """
        examples = [
            replace(each if isinstance(each, Example) else question_of(each, f"text:{number}"), answer=self.choices[0])
            for number, each in enumerate(texts, start=1)
        ]
        if not examples:
            return []
        with self._lock:  # draws go into the one model in turn, and a tokenizer is of one thread at a time
            items = self._reader.encode(examples, self._task, self.choices, self._rule.by_length)
            drawn, scaled = self._evaluate(items, self._variants, reporter=reporter)
        order = drawn.group.argsort()
        assert scaled.probabilities is not None
        columns = (scaled.probabilities, drawn.expected_entropy, drawn.entropy - drawn.expected_entropy)
        return [self._decision(*row) for row in zip(*(column[order].tolist() for column in columns), strict=True)]

    def _decision(self, probabilities: list[float], expected_entropy: float, mutual_information: float) -> Decision:
        by_label = dict(zip(self.choices, probabilities, strict=True))
        label = max(by_label, key=by_label.__getitem__)
        threshold, sets = self._rule.threshold, self._rule.prediction_set
        decision = Decision(
            label=label,
            confidence=min(by_label[label], 1.0),
            expected_entropy=expected_entropy,
            mutual_information=max(mutual_information, 0.0),
            probabilities=by_label,
        )
        more: dict[str, Any] = {}
        if threshold is not None:
            more["abstain"] = is_below(decision.confidence, threshold)
        if sets is not None:
            more["set"] = labels_in_set(by_label, sets.threshold)
        return decision.model_copy(update=more)

    def windows(
        self, examples: Iterable[Example], reporter: Reporter = SILENT
    ) -> Iterator[list[tuple[Example, Decision]]]:
        """Yield examples with their decisions as they come, in windows that grow."""
        examples, size = iter(examples), _FIRST_WINDOW
        while window := list(itertools.islice(examples, size)):
            yield list(zip(window, self(window, reporter), strict=True))
            size = min(2 * size, _LARGEST_WINDOW)


def _choices(posterior: Posterior, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the labels to choose from; none where the classification head has its own."""
    if has_head(posterior):
        if given is not None:
            raise IVONError(
                f"{param_ref('choices')}: the adapter has a classification head with labels of its own; leave it out"
            )
        return ()
    if isinstance(given, str) or not all(isinstance(choice, str) for choice in given or ()):
        raise IVONError(f"{param_ref('choices')}: {given!r} is no list of strings; give one, as ['A', 'B']")
    choices = trained_choices(posterior.metadata) if given is None else tuple(given)
    if not choices:
        raise IVONError(
            f"{posterior.folder} does not say which answers its training data had; name the labels with "
            f"{param_ref('choices')} A,B"
        )
    return find_choices((), choices)


def predict(
    adapter: Posterior | str | os.PathLike[str],
    texts: Iterable[str | Sequence[Message]],
    choices: Sequence[str] | None = None,
    n: int = 10,
    seed: int = 0,
    *,
    threshold: float | None = None,
    loading: Loading = Loading(),
) -> list[Decision]:
    """Return for each text the label, its confidence, and the probability of every label.

        decisions = predict("adapter/", ["The film was dull.", "A joy."], choices=["positive", "negative"])
        decisions[0].label, decisions[0].confidence, decisions[0].probabilities

    Padding, the place of the answer and the tokens of the labels are taken care of. A label's probability is the
    likelihood of all its tokens as a share of that of all labels, averaged over draws. The model is loaded in each
    call; `decisions.decide.Decider` keeps it. The former `predict(posterior, model, batch)` is `predict_logits`.

    Args:
        adapter: a folder or Hub id, with which is predicted as its recommended.json says, else by draws, or by the mean
            where there is no σ; or a `Posterior` that was read from a folder, by draws as it is.
        texts: what a user says, or the messages of a chat before the answer; a list, or a column of a table.
        choices: the labels; by default the answers of the training data, or the labels of a classification head.
        n, seed: the draws are `posterior.sample(seed, 0)` to `posterior.sample(seed, n − 1)`.
        threshold: the confidence below which a decision says `abstain`; by default that of recommended.json.

    Raises:
        IVONError: the adapter or its base model cannot be read, no labels are known, or a text does not fit the model.
    """
    if isinstance(choices, Mapping):
        from ..models.draws import predict_logits

        return predict_logits(adapter, texts, choices, n, seed)  # type: ignore
    if isinstance(texts, str):
        raise IVONError(f"{param_ref('texts')}: {texts!r} is one text; give a list of them")
    if not isinstance(texts, Iterable):
        raise IVONError(f"{param_ref('texts')}: {texts!r} is no text; give a list of them")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str | Sequence):
            raise IVONError(f"{param_ref('texts')}: {text!r} is no text; give strings, or lists of messages")
    if n < 1:
        raise IVONError(f"{param_ref('n')} {n}: give a number of draws from 1 on")
    taken = None if isinstance(adapter, Posterior) else recommended_for(adapter)
    rule, tau, ratio = (taken.rule, taken.tau, taken.ratio) if taken else (DecisionRule(), None, 0.0)
    if threshold is not None:
        rule = replace(rule, threshold=threshold, score="probability")
    return Decider(adapter, choices, rule, Sampling(n, seed), tau=tau, ratio=ratio, loading=loading)(texts)
