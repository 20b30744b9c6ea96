"""Batches of examples that fit the memory: cut by tokens, and halved when it runs out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..data.encode import EncodedExample
from ..data.label_tree import LabelTree, label_tree
from ..errors import IVONError, param_ref
from ..noise import generator
from ..reporter import SILENT, Reporter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_S = TypeVar("_S")
_T = TypeVar("_T")

_TOKENS_ON_CPU = 512  # in a batch; more would only add padding
_GRADIENT_TOKENS, _PREDICTION_TOKENS = 8192, 16384  # in a batch on an accelerator
GRADIENT_LOGITS = 2**26  # of one batch: 256 MiB in float32, and as much for their gradient
PREDICTION_LOGITS = 2**27
_WINDOW = 64  # examples that are sorted by length, so that few tokens are padding
MORE_MEMORY = f"use {param_ref('load_in')} 8bit or 4bit, shorter data, or a machine with more memory"


def batch_tokens(device: str, gradients: bool = False) -> int:
    """Return how many tokens a batch holds by default, on a device of this type ("cpu", "cuda")."""
    return _TOKENS_ON_CPU if device == "cpu" else _GRADIENT_TOKENS if gradients else _PREDICTION_TOKENS


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (rows, length), and where in them the scored positions are: row and column (m,).

    `mask` (rows, tokens in the cache + length) is None where no row is padded. `slots` (m,) numbers the scored
    positions. `tree` has the tokens of the labels, which come after the one position of each row.
    """

    ids: Tensor
    mask: Tensor | None
    row: Tensor
    column: Tensor
    slots: Tensor
    tree: LabelTree | None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> Batch:
        """Return rows `start` to `stop` as a batch."""
        if stop - start == len(self):
            return self
        chosen = (self.row >= start) & (self.row < stop)
        return Batch(
            self.ids[start:stop],
            None if self.mask is None else self.mask[start:stop],
            self.row[chosen] - start,
            self.column[chosen],
            self.slots[chosen],
            self.tree,
        )


def collate(items: Sequence[EncodedExample], model: PeftModel, skip: int = 0, first_slot: int = 0) -> Batch:
    """Pad on the right, whatever the tokenizer would do: positions then need no correction in any model.

    `skip` tokens at the start of every item are left out: they are in the cache.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device, labels = model.device, items[0].candidates
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = pad_sequence([torch.tensor(item.ids[skip:]) for item in items], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(item.ids), dtype=torch.long) for item in items], batch_first=True)
    row = torch.tensor([number for number, item in enumerate(items) for _ in item.positions], device=device)
    column = torch.tensor([position - skip for item in items for position in item.positions], device=device)
    return Batch(
        ids.to(device),
        None if mask.all() else mask.to(device),
        row,
        column,
        torch.arange(first_slot, first_slot + len(row), device=device),
        None if labels is None else label_tree(labels, items[0].by_length),
    )


def cut(items: Iterable[_S], fits: Callable[[Sequence[_S]], bool]) -> Iterator[list[_S]]:
    """Cut items, in their order, into parts that are as long as they fit; one item always does."""
    part: list[_S] = []
    for item in items:
        if part and not fits([*part, item]):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


class Batches:
    """Cut examples into batches for backward passes: of `batch_size`, or of as many tokens and logits as fit."""

    def __init__(self, items: Sequence[EncodedExample], batch_size: int | None, device: str, classes: int) -> None:
        self._items, self._size, self._classes = items, batch_size, classes
        self._tokens = batch_tokens(device, gradients=True)

    def once(self) -> list[list[EncodedExample]]:
        """Return every example once, by length."""
        return list(cut(sorted(self._items, key=_length), self._fits))

    def endless(self, seed: int) -> Iterator[list[EncodedExample]]:
        """Yield batches for ever, epoch after epoch in an order that depends on the seed and the epoch alone."""
        for epoch in itertools.count():
            random = generator("order of fit", seed, epoch)
            order = [self._items[index] for index in random.permutation(len(self._items)).tolist()]
            windows = (order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW))
            batches = [batch for window in windows for batch in cut(sorted(window, key=_length), self._fits)]
            for number in random.permutation(len(batches)).tolist():
                yield batches[number]

    def _fits(self, batch: Sequence[EncodedExample]) -> bool:
        if self._size is not None:
            return len(batch) <= self._size
        labels = sum(len(item.positions) for item in batch)
        longest = max(len(item.ids) for item in batch)
        return len(batch) * longest <= self._tokens and labels * self._classes <= GRADIENT_LOGITS


def _length(item: EncodedExample) -> int:
    return len(item.ids)


def out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that the memory ran out."""
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


class Halving:
    """Run work on as many examples at once as fit the memory: half as many each time that it runs out.

    What fitted is remembered: later calls begin with it.

    Args:
        what: the name of the things that are counted, in messages.
        reporter: notified each time that fewer run at once.
    """

    def __init__(self, what: str = "examples", reporter: Reporter = SILENT) -> None:
        self._what, self._reporter = what, reporter
        self._limit = sys.maxsize  # total cost of a call that fits

    def __call__(
        self, count: int, run: Callable[[int, int], _T], hopeless: str, cost: int = 1
    ) -> Iterator[tuple[int, int, _T]]:
        """Yield (start, stop, `run(start, stop)`) until all `count` are done; `hopeless` and `cost` as in `at_most`.

        Raises:
            IVONError: the memory runs out with a single one.
        """
        start = 0

        def run_first(size: int) -> _T:
            return run(start, start + size)

        while start < count:
            result, size = self.at_most(count - start, run_first, hopeless, cost)
            yield start, start + size, result
            start += size

    def over(self, items: Sequence[_S], run: Callable[[Sequence[_S]], _T]) -> Iterator[tuple[Sequence[_S], _T]]:
        """Yield (part, `run(part)`) for neighbouring parts of `items`, as large as fit.

        Raises:
            IVONError: the memory runs out with a single one.
        """
        for start, stop, result in self(
            len(items), lambda start, stop: run(items[start:stop]), f"example; {MORE_MEMORY}"
        ):
            yield items[start:stop], result

    def at_most(self, most: int, run: Callable[[int], _T], hopeless: str, cost: int = 1) -> tuple[_T, int]:
        """Return (`run(n)`, n) for n = `most`, or for the largest half, quarter, … of it that fits.

        Args:
            hopeless: end of the message when not even one fits: "prompt of 300 tokens; use …".
            cost: what one of them takes of the memory, in a unit that all calls share (tokens, say).

        Raises:
            IVONError: the memory runs out at n = 1.
        """
        from accelerate.utils.memory import clear_device_cache

        size = most = min(most, max(1, self._limit // cost))
        while True:
            try:
                result = run(size)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            else:
                if size < most:
                    self._limit = cost * size
                return result, size
            # Only here, after the exception, does nothing hold the tensors that did not fit.
            clear_device_cache(garbage_collection=True)
            if size == 1:
                raise IVONError(f"out of memory with a single {hopeless}")
            self._reporter.notify(f"out of memory with {size} {self._what} in a batch; going on with {size // 2}")
            size //= 2
