"""Answers from a model in memory: every token is chosen from the average of the members' next-token probabilities.

All members are fed with the same tokens. They run in one batch over shared base weights (`models.draws.Stack`) with one
key-value cache; adapters that cannot be stacked (DoRA, saved modules, …) run one member after another.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...data.encode import EncodedExample, common_length
from ...decisions.conformal import labels_in_set
from ...decisions.rule import DecisionRule
from ...errors import IVONError
from ...evaluation.predict import Predictor
from ...generation.local import next_tokens
from ...generation.uncertainty import split_entropy
from ...metrics.calibration import rescale
from ...metrics.scores import entropy
from ...models.draws import Stack, evaluating
from ...models.forward import CachedForward, end_tokens
from ...noise import generator
from ...reporter import SILENT
from ..api.answer_schema import FieldValues, FreeString
from ..api.answers import LEAST_LOGPROB, AnswerDelta, Token, certainty, certainty_of
from .text import GrowingText

if TYPE_CHECKING:
    from ...models.draws import AdapterSlots
    from ...models.session import Session
    from ...posterior.posterior import Posterior


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how to generate its answers."""

    model: str  # the served name, one of the engine's
    ids: tuple[int, ...]  # the prompt's tokens
    n: int = 1  # the number of answers
    max_tokens: int = 16  # of each, the token that ends it included
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top: int | None = None  # the number of likeliest tokens to return at each place; None: no tokens are returned
    seed: int = 0  # of the answers
    labels: tuple[str, ...] = ()  # the strings of which an answer is one; none: it is any text
    candidates: tuple[tuple[int, ...], ...] = ()  # their tokens after the prompt
    fields: Mapping[str, FieldValues] = field(default_factory=dict)  # of a JSON object, and their values


class TokenEngine:
    """Draws of a posterior over one base model; not for several threads at once.

    `NAME:posterior` is the average of all members, `NAME:mean` the mean alone and `NAME:member-0000` the first member
    alone, as `ivon-post sample` draws it with the same seed. `NAME` is the first of them, or the mean.

    Args:
        session: the base model with the adapter of `posterior`, which is pruned and tempered as wished.
        rule: the softmax temperature of the members' average, and the threshold below which to abstain.
        samples, seed: the number of members, and the seed of `Posterior.sample`.
        mean_rule: that of the mean, if it answers as `NAME`; members are then drawn when somebody asks for them.

    Attributes:
        check: raises IVONError if a token of a prompt is none of the model's.
        models: the served names, and what answers as each.
        max_length: the most tokens of a prompt and its answer together; None: the model has no limit.
    """

    def __init__(
        self,
        session: Session,
        posterior: Posterior,
        rule: DecisionRule,
        *,
        name: str,
        samples: int = 8,
        seed: int = 0,
        mean_rule: DecisionRule | None = None,
    ) -> None:
        self._model, self.max_length = session.model, session.max_length
        members = functools.partial(_Members, session.model, session.slots)
        held = members([dict(posterior.mean)])
        drawn = functools.cache(lambda: members([posterior.sample(seed, member) for member in range(samples)]))
        average = _Served(drawn, slice(0, samples), rule)
        plain = DecisionRule(by_length=rule.by_length)
        mean = _Served(lambda: held, slice(0, 1), mean_rule or plain)
        if mean_rule is None:
            drawn()
        self.models = {name: average if mean_rule is None else mean, f"{name}:mean": mean, f"{name}:posterior": average}
        for k in range(samples):
            self.models[f"{name}:member-{k:04d}"] = _Served(drawn, slice(k, k + 1), plain)
        self.check = functools.partial(session.check_tokens, source="prompt")
        self._forward = CachedForward(self._model)
        self._predictor = Predictor(self._model, "choice", None, SILENT)
        tokenizer = session.tokenizer
        self._tokenize = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self._ends = end_tokens(self._model, tokenizer)
        vocabulary = session.model.config.get_text_config().vocab_size
        self._without_text = sorted({*tokenizer.all_special_ids, *range(len(tokenizer), vocabulary)})
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._name_of = functools.lru_cache(maxsize=1 << 16)(lambda id: str(tokenizer.decode([id])))

    def deltas(self, request: GenerationRequest) -> Generator[list[AnswerDelta], None, None]:
        """Yield, for every step, the newest part of each answer that goes on; the last part says why it ends.

        With labels there is one step, from the averaged probability of each whole label; with fields, too.
        """
        if request.labels or request.fields:
            yield [self._fill(request)] if request.fields else self._choose(request)
            return
        served = self.models[request.model]
        members, rule = served.which.stop - served.which.start, served.rule
        decoder = _Decoder(self._forward, served.members(), served.which)
        bits = [generator("serve", request.seed, index).bit_generator for index in range(request.n)]
        certainty = functools.partial(certainty_of, members=members, threshold=rule.threshold)
        answers = [_Answer(index, GrowingText(self._decode, request.stop), certainty) for index in range(request.n)]
        alive = list(range(request.n))
        with evaluating(self._model):
            prompt = torch.tensor([request.ids], device=self._model.device)
            logits = decoder.run(prompt).expand(members, request.n, -1)
            for step in range(request.max_tokens):
                mixed = mixture(logits, rule.temperature)
                # 23 bits, so that a float32 below 1 stays below it in a product.
                drawn = [int(bits[index].random_raw()) >> 41 for index in alive]
                uniform = torch.tensor(drawn, dtype=torch.float32, device=self._model.device) / 2**23
                chosen = next_tokens(mixed[0], uniform, request.temperature, request.top_p)
                last = step + 1 == request.max_tokens
                tokens = zip(alive, self._tokens(*mixed, chosen, request.top), strict=True)
                deltas = [answers[number].step(token, token.id in self._ends, last) for number, token in tokens]
                yield deltas
                rows = [row for row, delta in enumerate(deltas) if not delta.finish]
                if not rows:
                    return
                parents = [0] * len(rows) if not step else rows if len(rows) < len(alive) else None
                alive = [alive[row] for row in rows]
                logits = decoder.run(chosen[rows, None], parents)

    def _choose(self, request: GenerationRequest) -> list[AnswerDelta]:
        """Return the answers of a request with labels."""
        served = self.models[request.model]
        members, rule = served.members(), served.rule
        item = EncodedExample(list(request.ids), [len(request.ids) - 1], [0], request.candidates, rule.by_length)
        [batch] = self._predictor.batches([item], 0, 1)
        passes = []
        with evaluating(self._model):
            for part in members.passes(served.which):
                with members.running(part):
                    predicted = self._predictor.predict(batch, None, part.stop - part.start)
                    passes += [probabilities[:, 0] for _, probabilities in predicted]
        return choose_labels(torch.cat(passes), request, rule)

    def _fill(self, request: GenerationRequest) -> AnswerDelta:
        """Return the JSON object of a request with fields: field after field a choice, given those before."""
        text, generated, probability, choices = "{", 0, 1.0, {}
        expected = mutual = 0.0
        served = self.models[request.model]
        for place, (name, values) in enumerate(request.fields.items(), start=1):
            text += json.dumps(name, ensure_ascii=False) + ": "
            end = "}" if place == len(request.fields) else ", "
            seeded = replace(request, fields={}, seed=request.seed + place)
            if isinstance(values, FreeString):
                chosen = self._write(seeded, text, values)
            else:
                chosen = self._value(seeded, text, end.strip(), values)
            ivon = chosen.ivon or {}
            by_value = ivon["choices"]
            expected, mutual = expected + ivon["expected_entropy"], mutual + ivon["mutual_information"]
            text, generated = text + chosen.text + end, generated + chosen.generated
            probability *= by_value[chosen.text]
            value = {"value": json.loads(chosen.text), "probability": by_value[chosen.text]}
            choices[name] = {**value, "probabilities": by_value}
        members, threshold = served.which.stop - served.which.start, served.rule.threshold
        ivon = certainty(probability, expected, mutual, members, threshold) | {"choices": choices}
        return AnswerDelta(0, text, (), "stop", ivon, generated)

    def _value(self, request: GenerationRequest, begun: str, end: str, values: Sequence[str]) -> AnswerDelta:
        """Return one of the values of a field, which stands between `begun` and `end`."""
        if len(values) == 1:
            ivon = {"choices": {values[0]: 1.0}, "expected_entropy": 0.0, "mutual_information": 0.0}
            return AnswerDelta(0, values[0], (), "stop", ivon)
        rows = [tuple(self._tokenize(begun + value + end)) for value in values]
        start = common_length(rows)
        candidates = tuple(row[start:] for row in rows)
        ids = (*request.ids, *rows[0][:start])
        [chosen] = self._choose(replace(request, ids=ids, labels=tuple(values), candidates=candidates))
        return chosen

    def _write(self, request: GenerationRequest, begun: str, values: FreeString) -> AnswerDelta:
        """Return a string as JSON after `begun`: each token is the likeliest one with which `values` allow it.

        Its probability is the product of the averaged probabilities of its tokens, each among all tokens of the model,
        that of the closing quote included. Entropies are sums over its tokens.
        """
        served = self.models[request.model]
        decoder = _Decoder(self._forward, served.members(), served.which)
        before, tokens = self._tokenize(begun + '"'), list[int]()
        start, newest, text = len(self._decode(before)), [*request.ids, *before], ""
        probability, expected, mutual = 1.0, 0.0, 0.0
        with evaluating(self._model):
            while '"' not in text:
                logits = decoder.run(torch.tensor([newest], device=self._model.device))
                average, within, between = mixture(logits, served.rule.temperature)
                average[:, self._without_text] = -math.inf
                for token in average[0].argsort(descending=True).tolist():
                    longer = str(self._decode([*before, *tokens, token]))[start:]
                    if longer != text and values.allows(longer):
                        break
                else:
                    raise IVONError("the tokenizer has no token that ends a string")
                probability *= math.exp(average[0, token])
                expected, mutual = expected + float(within), mutual + float(between)
                tokens, newest, text = [*tokens, token], [token], longer
        value = f'"{text.partition(chr(34))[0]}"'
        ivon = {"choices": {value: probability}, "expected_entropy": expected, "mutual_information": mutual}
        return AnswerDelta(0, value, (), "stop", ivon, len(tokens))

    def _tokens(
        self, average: torch.Tensor, expected: torch.Tensor, mutual: torch.Tensor, chosen: torch.Tensor, top: int | None
    ) -> Iterator[Token]:
        """Yield the chosen token of every row, which adds no text yet."""
        logprobs = average.gather(1, chosen[:, None])[:, 0]
        numbers = torch.stack([logprobs.clamp(min=LEAST_LOGPROB), expected, mutual], 1).tolist()
        likeliest: list[Any] = [()] * len(chosen)
        if top:
            values, ids = average.topk(min(top, average.shape[1]))
            likeliest = [zip(*row, strict=True) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        for id, (logprob, *entropies), others in zip(chosen.tolist(), numbers, likeliest, strict=True):
            named = tuple((self._name_of(other), max(value, LEAST_LOGPROB)) for other, value in others)
            yield Token(id, self._name_of(id), "", logprob, named, *entropies)


def choose_labels(drawn: torch.Tensor, request: GenerationRequest, rule: DecisionRule) -> list[AnswerDelta]:
    """Return the answers of a request with labels, from the probabilities that draws give these, [draws, labels]."""
    _, expected, mutual = split_entropy((drawn / len(drawn)).cpu().numpy())
    shares = rescale(drawn.mean(0)[None], rule.temperature)[0]
    by_label = dict(zip(request.labels, shares.tolist(), strict=True))
    deltas = []
    for number in range(request.n):
        uniform = torch.tensor([generator("serve", request.seed, number).random()])
        index = int(next_tokens(shares.log()[None].float(), uniform, request.temperature, request.top_p))
        label = request.labels[index]
        ivon = certainty(by_label[label], expected, mutual, len(drawn), rule.threshold)
        ivon["choices"] = by_label
        if rule.prediction_set is not None:
            ivon["set"] = labels_in_set(by_label, rule.prediction_set.threshold)
        deltas.append(AnswerDelta(number, label, (), "stop", ivon, len(request.candidates[index])))
    return deltas


def mixture(logits: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the average of the members' distributions, as log-probabilities, and two entropies in nats.

    Args:
        logits: float32, shape (members, rows, vocabulary).
        temperature: T of the result, p ∝ (1/M Σ_m p_m)^(1/T).

    Returns:
        log p, shape (rows, vocabulary); the expected entropy 1/M Σ_m H[p_m] and the mutual information, shape (rows,),
        before T, which says nothing about how far members disagree; of one member H[p] and 0.
    """
    if len(logits) == 1:
        average = (logits[0] / temperature).log_softmax(-1)
        expected = entropy(average.exp())
        return average, expected, torch.zeros_like(expected)
    logprobs = logits.log_softmax(-1)
    average = logprobs.logsumexp(0) - math.log(len(logprobs))
    expected = entropy(logprobs.exp()).mean(0)
    mutual = (entropy(average.exp()) - expected).clamp(min=0)
    return average if temperature == 1 else (average / temperature).log_softmax(-1), expected, mutual


class _Answer:
    """One answer as it grows."""

    def __init__(self, index: int, text: GrowingText, certainty: Callable[[Sequence[Token]], dict[str, Any]]) -> None:
        self._index, self._text, self._certainty = index, text, certainty
        self._shown: list[Token] = []

    def step(self, token: Token, ends: bool, last: bool) -> AnswerDelta:
        """Return the part of the answer that the newest token completes."""
        text, tokens = "", tuple[Token, ...]()
        if not ends:
            token = token._replace(text=self._text.add(token.id))
            text, tokens = self._text.release(token)
        finish, ivon = "stop" if ends or self._text.stopped else "length" if last else None, None
        if finish:
            rest, others = self._text.rest()
            text, tokens = text + rest, tokens + others
        self._shown += tokens
        if finish:  # the certainty of an answer without tokens is that of the token that ended it
            ivon = self._certainty(self._shown or [token])
        return AnswerDelta(self._index, text, tokens, finish, ivon, generated=1)


class _Members:
    """Weights over one base model; all run in one pass, or each in its own if they cannot be stacked."""

    def __init__(self, model: Any, slots: AdapterSlots, draws: list[Mapping[str, Any]]) -> None:
        self._slots, self._draws = slots, draws
        self._stack: Stack | None = None
        with contextlib.suppress(IVONError):
            self._stack = Stack(model, draws)
            self._draws = []  # the stack has them

    def passes(self, which: slice) -> list[slice]:
        """Return the parts of `which` that run one after another."""
        return [which] if self._stack else [slice(k, k + 1) for k in range(which.start, which.stop)]

    def running(self, part: slice) -> contextlib.AbstractContextManager[None]:
        """Run one of these parts inside the block."""
        return self._stack.running(part) if self._stack else self._slots.loaded(self._draws[part.start])


class _Served(NamedTuple):
    """What answers under a name: the average of some members, at a softmax temperature."""

    members: Callable[[], _Members]
    which: slice
    rule: DecisionRule


class _Decoder:
    """The forward passes of one request; they return the newest logits, shape (members, answers, vocabulary)."""

    def __init__(self, forward: CachedForward, members: _Members, which: slice) -> None:
        self._forward, self._members, self._passes = forward, members, members.passes(which)
        self._caches: list[Any] = [None] * len(self._passes)
        self._answers, self._length = 1, 0

    def run(self, ids: torch.Tensor, parents: list[int] | None = None) -> torch.Tensor:
        """Return the logits after the prompt, shape (1, tokens), or one more token of every answer, shape (answers, 1).

        `parents` are the rows, in the pass before, that the answers continue; None: all continue their own.
        """
        if parents is not None:
            for part, cache in zip(self._passes, self._caches, strict=True):
                rows = [k * self._answers + row for k in range(part.stop - part.start) for row in parents]
                cache.reorder_cache(torch.tensor(rows, device=ids.device))
            self._answers = len(parents)
        self._length += ids.shape[1]
        passes = []
        for number, part in enumerate(self._passes):
            members = part.stop - part.start
            mask = ids.new_ones(members * self._answers, self._length)
            with self._members.running(part):
                logits, self._caches[number] = self._forward(ids.repeat(members, 1), mask, self._caches[number])
            passes.append(logits.view(members, self._answers, -1))
        return torch.cat(passes)
