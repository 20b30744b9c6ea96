"""Answers from a model in memory: every token is chosen from the average of the members' next-token probabilities.

All members are fed with the same tokens. They run in one batch over shared base weights (`models.Stack`) with one
key-value cache; adapters that cannot be stacked (DoRA, saved modules, …) run one member after another.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ...data.encode import check_tokens
from ...errors import IVONError
from ...generation.local import next_tokens
from ...models.draws import AdapterSlots, Stack, evaluating
from ...models.forward import CachedForward, end_tokens
from ...noise import generator
from ...posterior.posterior import Posterior
from ..pieces import LEAST_LOGPROB, Ask, Piece, Text, Token, answer_facts, token_facts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Engine:
    """Draws of a posterior over one base model; see the module.

    Not for several threads at once. `NAME` is the average of all members, `NAME:mean` the mean alone and
    `NAME:member-0000` the first member alone, as `ivon-post sample` draws it with the same seed.

    Args:
        model: as `load_model` returns it; it is put in evaluation mode.
        posterior: pruned and tempered as wished.
        name: of the average.
        samples, seed: how many members, and the seed of `Posterior.sample`.
        temperature: of the confidence: log-probabilities are divided by it.
        threshold: of the confidence, from which on to answer; None: nothing is said of abstaining.

    Attributes:
        longest: how many tokens a prompt and its answer may have together; None: the model has no limit.

    Raises:
        IVONError: the model does not fit the posterior.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        posterior: Posterior,
        *,
        name: str,
        samples: int = 8,
        seed: int = 0,
        temperature: float = 1.0,
        threshold: float | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._temperature, self._threshold = temperature, threshold
        self._slots = AdapterSlots(model)
        self._slots.check(posterior.mean)
        self._draws: list[Mapping[str, Any]] = [dict(posterior.mean)]
        self._draws += [posterior.sample(seed, member) for member in range(samples)]
        self._stack: Stack | None = None
        with contextlib.suppress(IVONError):  # one member after another, then
            self._stack = Stack(model, self._draws)
            self._draws = []  # the stack has them
        self._models = {name: slice(1, 1 + samples), f"{name}:mean": slice(0, 1)}
        self._models |= {f"{name}:member-{k:04d}": slice(k + 1, k + 2) for k in range(samples)}
        base: Any = model.get_base_model()
        self.longest: int | None = getattr(base.config, "max_position_embeddings", None)
        self._embeddings: int = base.get_input_embeddings().weight.shape[0]
        self._forward = CachedForward(model)
        self._ends = end_tokens(model, tokenizer)
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._name_of = functools.lru_cache(maxsize=1 << 16)(lambda id: str(tokenizer.decode([id])))
        model.eval()

    @property
    def models(self) -> Mapping[str, slice]:
        """The served names, and which of mean and members each is the average of."""
        return self._models

    def _running(self, part: slice) -> AbstractContextManager[None]:
        return self._stack.running(part) if self._stack else self._slots.loaded(self._draws[part.start])

    def check(self, ids: tuple[int, ...]) -> None:
        """Raise IVONError if a token of a prompt is none of the model's."""
        check_tokens(ids, self._embeddings, "prompt")

    def pieces(self, ask: Ask) -> Generator[list[Piece], None, None]:
        """Yield, for every token, what it adds to the answers; the last piece of each says why it ends."""
        with evaluating(self._model):
            yield from self._pieces(ask)

    def _pieces(self, ask: Ask) -> Iterator[list[Piece]]:
        device = self._model.device
        which = self._models[ask.model]
        members = which.stop - which.start
        decoder = _Decoder(self, which)
        bits = [generator("serve", ask.seed, index).bit_generator for index in range(ask.n)]
        answers = [_Answer(Text(self._decode, ask.stop)) for _ in range(ask.n)]
        alive = list(range(ask.n))
        logits = decoder.begin(ask.ids).expand(members, ask.n, -1)
        for step in range(ask.max_tokens):
            average, expected, total = mixed(logits)
            # 23 bits, so that a float32 below 1 stays below it in a product.
            drawn = [int(bits[index].random_raw()) >> 41 for index in alive]
            uniform = torch.tensor(drawn, dtype=torch.float32, device=device) / 2**23
            chosen = next_tokens(average, uniform, ask.temperature, ask.top_p)
            pieces, going = [], []
            for row, token in enumerate(self._tokens(average, expected, total, chosen, ask.top)):
                index, id = alive[row], token.id
                answer = answers[index]
                piece = answer.step(index, token, id in self._ends, step + 1 == ask.max_tokens)
                if piece.finish:
                    piece = piece._replace(ivon=answer.facts(members, self._threshold, ask.top is not None))
                else:
                    going.append(row)
                pieces.append(piece)
            yield pieces
            if not going:
                return
            parents = [0] * len(going) if not step else going if len(going) < len(alive) else None
            alive = [alive[row] for row in going]
            logits = decoder.go_on(chosen[going], parents)

    def _tokens(
        self, average: torch.Tensor, expected: torch.Tensor, total: torch.Tensor, chosen: torch.Tensor, top: int | None
    ) -> Iterator[Token]:
        """Yield the chosen token of every row, which adds no text yet."""
        scaled = average if self._temperature == 1 else (average / self._temperature).log_softmax(-1)
        own = (each.gather(1, chosen[:, None])[:, 0] for each in (average, scaled))
        numbers = torch.stack([*own, expected, total - expected], 1).tolist()
        likeliest: list[Any] = [()] * len(chosen)
        if top:
            values, ids = average.topk(min(top, average.shape[1]))
            likeliest = [zip(*row, strict=True) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        for id, (logprob, confidence, within, between), others in zip(chosen.tolist(), numbers, likeliest, strict=True):
            named = tuple((self._name_of(other), max(value, LEAST_LOGPROB)) for other, value in others)
            floor = max(logprob, LEAST_LOGPROB), max(confidence, LEAST_LOGPROB)
            yield Token(id, self._name_of(id), "", floor[0], named, floor[1], within, max(between, 0.0))


def out_of_memory(error: BaseException) -> bool:
    """Say whether an exception is that the memory ran out, and if so free what is held for later."""
    if not (isinstance(error, Exception) and should_reduce_batch_size(error)):
        return False
    clear_device_cache(garbage_collection=True)
    return True


def mixed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the average of members' distributions, as log-probabilities, and two entropies in nats.

    Args:
        logits: float32, shape (members, rows, vocabulary).

    Returns:
        log p, shape (rows, vocabulary); the expected entropy 1/M Σ_m H[p_m] and the entropy H[p], shape (rows,).
    """
    logprobs = logits.log_softmax(-1)
    average = logprobs[0] if len(logprobs) == 1 else logprobs.logsumexp(0) - math.log(len(logprobs))
    total = torch.special.entr(average.exp()).sum(-1)
    return average, total if len(logprobs) == 1 else torch.special.entr(logprobs.exp()).sum(-1).mean(0), total


class _Answer:
    """One answer as it grows."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._shown: list[Token] = []
        self._newest: Token | None = None

    def step(self, index: int, token: Token, ends: bool, last: bool) -> Piece:
        """Return the piece that the newest token completes."""
        text = ""
        tokens: tuple[Token, ...] = ()
        if not ends:
            token = token._replace(text=self._text.add(token.id))
            text, tokens = self._text.take(token)
        finish = "stop" if ends or self._text.stopped else "length" if last else None
        if finish:
            rest, others = self._text.rest()
            text, tokens = text + rest, tokens + others
        self._newest = token
        self._shown += tokens
        return Piece(index, text, tokens, finish, generated=1)

    def facts(self, members: int, threshold: float | None, with_tokens: bool) -> dict[str, Any]:
        """Return `ivon` of the whole answer; one without tokens is as sure as what ended it."""
        assert self._newest is not None
        facts = answer_facts(self._shown or [self._newest], members, threshold)
        return facts | {"tokens": list(map(token_facts, self._shown))} if with_tokens else facts


class _Decoder:
    """The passes of one request, which give the newest tokens' logits, shape (members, answers, vocabulary)."""

    def __init__(self, engine: Engine, which: slice) -> None:
        self._engine = engine
        # What runs in one pass: all members, or where they cannot be stacked each by itself.
        single = [slice(k, k + 1) for k in range(which.start, which.stop)]
        self._passes = [which] if engine._stack else single
        self._caches: list[Any] = [None] * len(self._passes)
        self._answers, self._length = 1, 0

    def begin(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Return the logits after the prompt, of one answer."""
        return self._run(torch.tensor([ids], device=self._engine._model.device))

    def go_on(self, tokens: torch.Tensor, parents: list[int] | None) -> torch.Tensor:
        """Return the logits after one more token of every answer.

        Args:
            tokens: shape (answers,).
            parents: which of the answers before each goes on from; None: all as they are.
        """
        if parents is not None:
            for part, cache in zip(self._passes, self._caches, strict=True):
                rows = [k * self._answers + row for k in range(part.stop - part.start) for row in parents]
                cache.reorder_cache(torch.tensor(rows, device=tokens.device))
            self._answers = len(parents)
        return self._run(tokens[:, None])

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        self._length += ids.shape[1]
        found = []
        for number, part in enumerate(self._passes):
            members = part.stop - part.start
            mask = ids.new_ones(members * self._answers, self._length)
            with self._engine._running(part):
                logits, cache = self._engine._forward(ids.repeat(members, 1), mask, self._caches[number])
            self._caches[number] = cache
            found.append(logits.view(members, self._answers, -1))
        return torch.cat(found)
