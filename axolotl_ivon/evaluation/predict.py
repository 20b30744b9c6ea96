"""Probabilities of the loaded weights on tokenised examples, in batches that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.encode import EncodedExample, common_length
from ..errors import param_ref
from ..models.batching import PREDICTION_LOGITS, Halving, batch_tokens
from ..models.forward import cache_name, forward_parameters
from ..reporter import Reporter

if TYPE_CHECKING:
    from peft import PeftModel

_MIN_PREFIX = 8  # a shorter common prefix is not worth its own pass


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
        batch_size: prompts in a batch, or None to choose; halved when the memory runs out.
        reporter: notified of that.
    """

    def __init__(self, model: PeftModel, task: str, batch_size: int | None, reporter: Reporter) -> None:
        self.model, self.task, self.device = model, task, model.device
        self._batch_size = batch_size
        self._takes = forward_parameters(model)  # the arguments of the base model's forward
        self._halving = Halving("prompts", reporter)

    def classes(self, items: Sequence[EncodedExample]) -> int:
        """Return the number of classes of a distribution."""
        if items[0].candidates is not None:
            return len(items[0].candidates)
        if self.task == "classify":
            return self.model.config.num_labels
        return self.model.config.get_text_config().vocab_size

    def common_prefix(self, items: Sequence[EncodedExample]) -> list[int]:
        """Return the tokens that all items begin with, before any scored position, if a pass can run them once."""
        if self.task == "classify" or len(items) < 2:
            return []
        length = min(common_length([item.ids for item in items]), min(item.positions[0] for item in items))
        prefix = list(items[0].ids[:length])
        return prefix if length >= _MIN_PREFIX and self.cache(prefix, 1) is not None else []

    def batches(self, items: Sequence[EncodedExample], skip: int, copies: int) -> list[Batch]:
        """Cut items (sorted by length) into batches; `copies` draws at once share the budget of tokens."""
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        tokens = batch_tokens(self.device.type)
        if self.task == "generate":
            tokens = min(tokens, PREDICTION_LOGITS // self.classes(items))
        batches: list[Batch] = []
        start = slot = 0
        for stop in range(1, len(items) + 1):
            size = stop + 1 - start  # with the next one
            if stop < len(items) and (
                size <= self._batch_size
                if self._batch_size is not None
                else size * copies * (len(items[stop].ids) - skip) <= tokens
            ):
                continue
            batches.append(collate(items[start:stop], slot, skip, pad, self.device))
            slot += len(batches[-1].slots)
            start = stop
        return batches

    def predict(self, batch: Batch, cache: Any, copies: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (part, probabilities (copies, m, classes)) for parts of the batch, smaller when the memory runs out.

        Raises:
            IVONError: one prompt alone is too large.
        """
        length = batch.ids.shape[1]
        hopeless = f"prompt of {length} tokens; use {param_ref('load_in')} 8bit or 4bit, or a machine with more memory"

        def run(start: int, stop: int) -> tuple[Batch, Tensor]:
            part = batch.part(start, stop)
            return part, self._forward(part, cache, copies)

        for _, _, predicted in self._halving(len(batch), run, hopeless, cost=copies * length):
            yield predicted

    def _forward(self, batch: Batch, cache: Any, copies: int) -> Tensor:
        columns, column = torch.unique(batch.column, return_inverse=True)
        inputs: dict[str, Any] = {"input_ids": batch.ids.repeat(copies, 1)}
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask.repeat(copies, 1)
        if self.task == "classify":
            logits = self.model(**inputs).logits.view(copies, len(batch), -1)
            return logits.double().softmax(-1)
        if cache is not None:  # a new one, in which every row stands once for each of the batch
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            rows = [(k.repeat_interleave(len(batch), 0), v.repeat_interleave(len(batch), 0)) for k, v in pairs]
            inputs[cache_name(self._takes)] = type(cache)(ddp_cache_data=rows)
        if "logits_to_keep" in self._takes:  # the head runs on the scored positions only
            inputs["logits_to_keep"] = columns
        else:
            column = batch.column
        logits = self.model(**inputs, use_cache=False).logits
        logits = logits.view(copies, len(batch), *logits.shape[1:])[:, batch.row, column]
        if batch.candidates is None:
            return logits.float().softmax(-1)
        return logits.gather(2, batch.candidates.expand(copies, -1, -1)).double().softmax(-1)

    def cache(self, ids: Sequence[int], copies: int) -> Any:
        """Return the cache after `ids` for each draw, or None if the model has none that batches can share."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=self.device).repeat(copies, 1)}
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        cache = getattr(self.model(**inputs, use_cache=True), cache_name(self._takes), None)
        # Sliding windows and recurrent states do not keep all of the prefix.
        if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
            return cache
        return None
