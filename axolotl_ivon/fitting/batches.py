"""The order in which examples are read, and how many at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ..data.encode import EncodedExample
from ..noise import generator

_TOKENS = {"cpu": 512}  # in a batch; on a CPU more would only add padding
_TOKENS_ELSEWHERE = 8192
_LOGITS = 2**26  # of one batch: 256 MiB in float32, and as much for their gradient
_WINDOW = 64  # examples that are sorted by length, so that few tokens are padding


class Batches:
    """Cuts examples into batches: of `batch_size`, or of as many as fit a number of tokens and of logits."""

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
