"""Generation with a model in memory: one base model, several draws in one batch over its weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from ..data.encode import Prompt
from ..errors import IVONError, param_ref
from ..models.batching import Halving
from ..models.draws import Stack, evaluating
from ..models.forward import CachedForward, end_tokens
from ..models.session import Session
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter
from .plan import Output, Plan, random_bits

_T = TypeVar("_T")
_ROWS_ON_CPU, _ROWS = 64, 256  # sequences that are decoded at once by default
_KEPT = 4 * 2**30  # bytes of draws that are kept between batches; more are drawn again each time
_GREEDY = 1e-6  # temperatures below choose the likeliest token: logits that are divided by them may overflow
_SHRINK = 0.75  # finished sequences leave the batch when it gets that much smaller


class TransformersEngine:
    """Generates with a model in memory; see `plan.Engine`.

    A batch holds sequences of several members, prompts and outputs: the base layers see them as one, each LoRA layer
    multiplies every member's rows by that member's own A and B (`models.draws.Stack`). A prompt runs once for each
    member, its key-value cache is then repeated for the outputs, and sequences that have ended leave the batch.
    transformers' `generate` lets none leave: half the tokens per second where outputs end at different lengths.

    Args:
        session: of the posterior's adapter.
        posterior: pruned and tempered as wished; member k is its `sample(plan.seed, k)`, as in `ivon-post sample`.
        batch_size: sequences that are decoded at once; halved when the memory runs out, which `reporter` is told.
    """

    def __init__(
        self,
        session: Session,
        posterior: Posterior,
        plan: Plan,
        *,
        batch_size: int | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        model = session.model
        self._session, self._posterior, self._plan = session, posterior, plan
        self._model, self._tokenizer, self._slots = model, session.tokenizer, session.slots
        self._halving = Halving("sequences", reporter)
        self._rows = batch_size or (_ROWS_ON_CPU if model.device.type == "cpu" else _ROWS)
        self._draws: dict[int, Mapping[str, torch.Tensor]] = {}
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._slots.places.values())
        self._kept = _KEPT // max(size, 1)
        self._stackable = False  # DoRA, saved modules, …: one member at a time
        with contextlib.suppress(IVONError), Stack(model, [dict(posterior.mean)] * 2).running():
            self._stackable = True
        self._forward = CachedForward(model)
        self._ends = end_tokens(model, session.tokenizer)
        # Only the newest token can complete a stop string, and none is longer, in tokens, than in bytes.
        self._tail = max((len(text.encode()) for text in plan.stop), default=0) + 4

    def outputs(self, prompts: Sequence[Prompt], start: int = 0) -> Iterator[list[Output]]:
        """Yield the outputs for each of `prompts[start:]`; raise IVONError if one does not fit the model or memory."""
        longest = self._session.max_length
        for prompt in prompts[start:]:
            if longest is not None and len(prompt.ids) + self._plan.max_tokens > longest:
                raise IVONError(
                    f"{prompt.source}: {len(prompt.ids)} tokens and {param_ref('max_tokens')} {self._plan.max_tokens}, "
                    f"but the model takes {longest}; shorten or remove it, or lower {param_ref('max_tokens')}"
                )
            self._session.check_tokens(prompt.ids, prompt.source)
        group = max(1, self._rows // (self._plan.members * self._plan.distinct))
        # Batches begin where those of an uninterrupted run do: rounding may depend on who is in a batch.
        for begin in range(start - start % group, len(prompts), group):
            batch = prompts[begin : begin + group]
            hopeless = (
                f"sequence of {max(len(prompt.ids) for prompt in batch)} tokens and {param_ref('max_tokens')} "
                f"{self._plan.max_tokens}; use {param_ref('load_in')} 8bit or 4bit, or a machine with more memory"
            )
            outputs, _ = self._halving.at_most(self._rows, functools.partial(self._generate, batch), hopeless)
            yield from outputs[max(0, start - begin) :]

    def _generate(self, prompts: Sequence[Prompt], rows: int) -> list[list[Output]]:
        """Return the prompts' outputs, made in batches of at most `rows` sequences."""
        plan = self._plan
        outputs = min(plan.distinct, rows)
        members = max(1, rows // outputs) if self._stackable else 1
        together = max(1, rows // (outputs * min(members, plan.members)))
        by_prompt: list[list[Output]] = [[] for _ in prompts]
        with evaluating(self._model):
            for group in _slices(range(plan.members), members):
                with self._slots.drawn([self._draw(member) for member in group])():
                    decoded = {
                        key: output
                        for part in _slices(range(len(prompts)), together)
                        for numbers in _slices(range(plan.distinct), outputs)
                        for key, output in self._decode(prompts, group, part, numbers)
                    }
                for index, collected in enumerate(by_prompt):
                    for member in group:
                        collected += [decoded[member, index, j % plan.distinct] for j in range(plan.per_member)]
        return by_prompt

    def _draw(self, member: int) -> Mapping[str, torch.Tensor]:
        if member in self._draws:
            return self._draws[member]
        plan, posterior = self._plan, self._posterior
        draw = dict(posterior.mean) if plan.mean else posterior.sample(plan.seed, member)
        if len(self._draws) < self._kept:
            self._draws[member] = draw
        return draw

    def _decode(
        self, prompts: Sequence[Prompt], members: Sequence[int], part: Sequence[int], numbers: Sequence[int]
    ) -> Iterator[tuple[tuple[int, int, int], Output]]:
        """Yield ((member, prompt's index, output's number), output) for one batch."""
        plan, device = self._plan, self._model.device
        keys = [(member, index, number) for member in members for index in part for number in numbers]
        drawn = [random_bits(plan, prompts[i], m, j).random_raw(plan.max_tokens) >> 41 for m, i, j in keys]
        # 23 bits, so that a float32 below 1 stays below it in a product.
        uniform = torch.tensor([values.tolist() for values in drawn], dtype=torch.float32, device=device) / 2**23
        # Prompts, padded on the left, run once for each member.
        ids, pad = [prompts[i].ids for i in part] * len(members), next(iter(self._ends), 0)
        width = max(map(len, ids))
        padded = torch.tensor([[pad] * (width - len(own)) + own for own in ids], device=device)
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in ids], device=device)
        logits, cache = self._forward(padded, mask, None)
        rows = torch.arange(len(mask), device=device).repeat_interleave(len(numbers))
        cache.reorder_cache(rows)
        logits, mask = logits[rows], mask[rows]
        slots = list(range(len(keys)))  # whose sequence each row of the batch is
        sequences: list[list[int]] = [[] for _ in keys]
        logprobs = [0.0] * len(keys)
        alive = [True] * len(keys)
        for step in range(plan.max_tokens):
            token = next_tokens(logits, uniform[slots, step], plan.temperature, plan.top_p)
            likely = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            for slot, newest, logprob in zip(slots, token.tolist(), likely.tolist(), strict=True):
                if alive[slot]:
                    sequences[slot].append(newest)
                    logprobs[slot] += logprob
                    alive[slot] = newest not in self._ends and not self._has_stopped(sequences[slot])
            if not any(alive) or step + 1 == plan.max_tokens:
                break
            kept = kept_rows([alive[slot] for slot in slots], len(members))
            if kept is not None:
                rows = torch.tensor(kept, device=device)
                cache.reorder_cache(rows)
                token, mask = token[rows], mask[rows]
                slots = [slots[row] for row in kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits, cache = self._forward(token[:, None], mask, cache)
        for key, sequence, logprob in zip(keys, sequences, logprobs, strict=True):
            yield key, Output(self._decoded_text(sequence), key[0], round(logprob, 6), len(sequence))

    def _has_stopped(self, sequence: list[int]) -> bool:
        stop = self._plan.stop
        end = self._tokenizer.decode(sequence[-self._tail :], skip_special_tokens=True) if stop else ""
        return any(text in end for text in stop)

    def _decoded_text(self, sequence: list[int]) -> str:
        text = str(self._tokenizer.decode(sequence, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text[: min((text.find(stop) for stop in self._plan.stop if stop in text), default=len(text))]


def next_tokens(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return a token for each row of logits: that at which the cumulated probability passes `uniform`.

    Args:
        logits: or log-probabilities, shape (rows, vocabulary).
        uniform: in [0, 1), shape (rows,).
    """
    if temperature < _GREEDY:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        probabilities = probabilities.masked_fill(outside, 0)
    cumulated = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    place = place.clamp(max=logits.shape[1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0]


def _slices(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(values), size):
        yield values[begin : begin + size]


def kept_rows(alive: Sequence[bool], members: int) -> list[int] | None:
    """Return which rows stay, the same number for each member and all that are alive, or None to keep all."""
    size = len(alive) // members
    blocks = list(_slices(alive, size))
    width = max(map(sum, blocks))
    if width > _SHRINK * size:
        return None
    rows: list[int] = []
    for number, block in enumerate(blocks):
        rows += [number * size + row for row in sorted(range(size), key=lambda row: not block[row])[:width]]
    return rows
