"""Probabilities of the loaded weights on tokenised examples, in batches that fit the memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.encode import EncodedExample
from ..errors import param_ref
from ..models.forward import cache_name, forward_parameters, run_halving

if TYPE_CHECKING:
    from peft import PeftModel

# Tokens in a batch when the size is "auto". On a CPU more would only add padding. Out of memory halves it.
_AUTO_TOKENS = {"cpu": 512}
_AUTO_TOKENS_ELSEWHERE = 16384
_LOGITS = 2**27  # logits of one batch of the task "generate": 512 MiB in float32


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (rows, length), and where in them the scored positions are: row and column (m,).

    `slots` (m,) says where the m distributions go among those of the chunk.
    """

    ids: Tensor
    mask: Tensor | None
    row: Tensor
    column: Tensor
    slots: Tensor
    candidates: Tensor | None

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
            None if self.candidates is None else self.candidates[chosen],
        )


def collate(items: Sequence[EncodedExample], first_slot: int, skip: int, pad: int, device: torch.device) -> Batch:
    """Pad on the right, whatever the tokenizer would do: positions then need no correction in any model.

    `skip` tokens at the start of every item are left out: they are in the cache.
    """
    length = max(len(item.ids) for item in items) - skip
    ids = torch.full((len(items), length), pad)
    mask = torch.zeros(len(items), length + skip, dtype=torch.long)
    for row, item in enumerate(items):
        ids[row, : len(item.ids) - skip] = torch.tensor(item.ids[skip:])
        mask[row, : len(item.ids)] = 1
    rows = torch.tensor([row for row, item in enumerate(items) for _ in item.positions])
    column = torch.tensor([position - skip for item in items for position in item.positions])
    candidates = None
    if items[0].candidates is not None:
        candidates = torch.tensor([item.candidates for item in items for _ in item.positions]).to(device)
    return Batch(
        ids.to(device),
        None if mask.all() else mask.to(device),
        rows.to(device),
        column.to(device),
        torch.arange(first_slot, first_slot + len(rows)).to(device),
        candidates,
    )


class Predictor:
    """Gives the probabilities of the loaded weights on items, in batches that fit the memory.

    Args:
        batch_size: prompts in a batch, or None to choose; halved when the memory runs out, which `notify` is told.
    """

    def __init__(self, model: PeftModel, task: str, batch_size: int | None, notify: Callable[[str], None]) -> None:
        self.model, self.task, self.batch_size, self.notify = model, task, batch_size, notify
        self.device = model.device
        self.tokens = _AUTO_TOKENS.get(self.device.type, _AUTO_TOKENS_ELSEWHERE)
        self.takes = forward_parameters(model)  # the arguments of the base model's forward
        self.ceiling = sys.maxsize  # tokens in a batch: lowered when the memory runs out

    def classes(self, items: Sequence[EncodedExample]) -> int:
        """Return the number of classes of a distribution."""
        if items[0].candidates is not None:
            return len(items[0].candidates)
        if self.task == "classify":
            return self.model.config.num_labels
        return self.model.config.get_text_config().vocab_size

    def batches(self, items: Sequence[EncodedExample], skip: int, copies: int) -> list[Batch]:
        """Cut items (sorted by length) into batches; `copies` draws at once share the budget of tokens."""
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        batches: list[Batch] = []
        start = slot = 0
        while start < len(items):
            stop = start + 1
            while stop < len(items) and self._fits(items, start, stop + 1, skip, copies):
                stop += 1
            batches.append(collate(items[start:stop], slot, skip, pad, self.device))
            slot += len(batches[-1].slots)
            start = stop
        return batches

    def _fits(self, items: Sequence[EncodedExample], start: int, stop: int, skip: int, copies: int) -> bool:
        if self.batch_size is not None:
            return stop - start <= self.batch_size
        budget = min(self.tokens, _LOGITS // self.classes(items)) if self.task == "generate" else self.tokens
        return (stop - start) * copies * (len(items[stop - 1].ids) - skip) <= budget

    def predict(self, batch: Batch, prefix: Any, copies: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (batch, probabilities (copies, m, classes)): in smaller parts when the memory runs out.

        Raises:
            IVONError: one prompt alone is too large.
        """
        length = batch.ids.shape[1]
        hopeless = (
            f"prompt of {length} tokens; use {param_ref('load_in')} 8bit or 4bit, {param_ref('draws_per_pass')} 1, "
            "or a machine with more memory"
        )
        start = 0
        while start < len(batch):
            most = min(len(batch) - start, max(1, self.ceiling // (copies * length)))

            def run(rows: int, start: int = start) -> tuple[Batch, Tensor]:
                part = batch.part(start, start + rows)
                return part, self._forward(part, prefix, copies)

            found, rows = run_halving(run, most, "prompts", self.notify, hopeless)
            if rows < most:
                self.ceiling = copies * length * rows
            yield found
            start += rows

    def _forward(self, batch: Batch, prefix: Any, copies: int) -> Tensor:
        columns, column = torch.unique(batch.column, return_inverse=True)
        inputs: dict[str, Any] = {"input_ids": batch.ids.repeat(copies, 1)}
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask.repeat(copies, 1)
        if self.task == "classify":
            logits = self.model(**inputs).logits.view(copies, len(batch), -1)
            return logits.double().softmax(-1)
        if prefix is not None:
            inputs[cache_name(self.takes)] = _repeated(prefix, len(batch))
        if "logits_to_keep" in self.takes:  # the head runs on the scored positions only
            inputs["logits_to_keep"] = columns
        else:
            column = batch.column
        logits = self.model(**inputs, use_cache=False).logits
        logits = logits.view(copies, len(batch), *logits.shape[1:])[:, batch.row, column]
        if batch.candidates is None:
            return logits.float().softmax(-1)
        return logits.gather(2, batch.candidates.expand(copies, -1, -1)).double().softmax(-1)

    def prefix(self, ids: Sequence[int], copies: int) -> Any:
        """Return the cache after `ids` for each draw, or None if the model has none that batches can share."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=self.device).repeat(copies, 1)}
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        cache = getattr(self.model(**inputs, use_cache=True), cache_name(self.takes), None)
        # Sliding windows and recurrent states do not keep all of the prefix.
        if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
            return cache
        return None


def _repeated(cache: Any, times: int) -> Any:
    """Return a new cache in which every row of `cache` stands `times` times; the given one is not changed."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(
        ddp_cache_data=[
            (layer.keys.repeat_interleave(times, 0), layer.values.repeat_interleave(times, 0)) for layer in cache.layers
        ]
    )
