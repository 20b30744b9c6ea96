"""Batches of examples that fit the memory: cut by tokens, and halved when it runs out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..noise import generator
from ..reporter import SILENT, Reporter

_T = TypeVar("_T")

_TOKENS = {"cpu": 512}  # in a batch; on a CPU more would only add padding
_TOKENS_ELSEWHERE = 8192
_LOGITS = 2**26  # of one batch: 256 MiB in float32, and as much for their gradient
_WINDOW = 64  # examples that are sorted by length, so that few tokens are padding


class Batches:
    """Cut examples into batches: of `batch_size`, or of as many as fit a number of tokens and of logits."""

    def __init__(self, items: Sequence[EncodedExample], batch_size: int | None, device: str, classes: int) -> None:
        self._items, self._size, self._classes = items, batch_size, classes
        self._tokens = _TOKENS.get(device, _TOKENS_ELSEWHERE)

    def once(self) -> list[list[EncodedExample]]:
        """Return every example once, by length."""
        return list(self._cut(sorted(range(len(self._items)), key=self._length)))

    def endless(self, seed: int) -> Iterator[list[EncodedExample]]:
        """Yield batches for ever, epoch after epoch in an order that depends on the seed and the epoch alone."""
        for epoch in itertools.count():
            random = generator("order of fit", seed, epoch)
            order = random.permutation(len(self._items)).tolist()
            windows = (order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW))
            batches = [batch for window in windows for batch in self._cut(sorted(window, key=self._length))]
            for number in random.permutation(len(batches)).tolist():
                yield batches[number]

    def _length(self, index: int) -> int:
        return len(self._items[index].ids)

    def _cut(self, order: Sequence[int]) -> Iterator[list[EncodedExample]]:
        batch: list[EncodedExample] = []
        for item in (self._items[i] for i in order):
            if batch and not self._fits([*batch, item]):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _fits(self, batch: Sequence[EncodedExample]) -> bool:
        if self._size is not None:
            return len(batch) <= self._size
        labels = sum(len(item.positions) for item in batch)
        longest = max(len(item.ids) for item in batch)
        return len(batch) * longest <= self._tokens and labels * self._classes <= _LOGITS


class Halving(Generic[_T]):
    """Run work on as many examples at once as fit the memory, and on half as many each time that it runs out.

    The number that fitted is remembered in `cost`, a measure of one call that grows with it (tokens, say).
    """

    def __init__(self, what: str = "examples", reporter: Reporter = SILENT) -> None:
        self._what, self._reporter = what, reporter
        self._ceiling = sys.maxsize

    def __call__(
        self, count: int, run: Callable[[int, int], _T], hopeless: str, cost: int = 1
    ) -> Iterator[tuple[int, int, _T]]:
        """Yield (start, stop, `run(start, stop)`) until all `count` are done.

        Args:
            hopeless: what a single one is called where not even that fits: "prompt of 300 tokens; use …".
            cost: what one of them takes.

        Raises:
            IVONError: the memory runs out with a single one.
        """
        start = 0
        while start < count:
            size = most = min(count - start, max(1, self._ceiling // cost))
            while True:
                found, fits = self._attempt(run, start, start + size)
                if fits:
                    break
                if size == 1:
                    raise IVONError(f"out of memory with a single {hopeless}")
                self._reporter.notify(f"out of memory with {size} {self._what} in a batch; going on with {size // 2}")
                size //= 2
            if size < most:
                self._ceiling = cost * size
            yield start, start + size, found
            start += size

    def _attempt(self, run: Callable[[int, int], _T], start: int, stop: int) -> tuple[_T, bool]:
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        try:
            return run(start, stop), True
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        # Only here, after the exception, does nothing hold the tensors that did not fit.
        clear_device_cache(garbage_collection=True)
        return None, False  # type: ignore[return-value]


def one_example(what: str = "example") -> str:
    """Return the `hopeless` of most work: what a single example that does not fit is told."""
    return f"{what}; use {param_ref('load_in')} 8bit or 4bit, shorter data, or a machine with more memory"
