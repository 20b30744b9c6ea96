"""Probabilities of the loaded weights on tokenised examples, in batches that fit the memory.

A label of several tokens has the product of their probabilities, each after the ones before it. Where one label begins
another, the token that ends the turn counts as well (`data.encode`). So labels are events of which two never happen
together, and what is returned is their share among all labels: p(label | the answer begins with one of them). Labels
of one token each need no pass beyond the prompt's.

The tokens of all labels run in the pass of the prompt, each once: they are appended to it as a tree (`LabelTree`), in
which a token attends to the prompt and to the tokens before it in its own label. A model that cannot attend so (sliding
windows, recurrence) runs the prompt once more for each label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..data.encode import EncodedExample, common_length
from ..data.label_tree import LabelTree, label_tree
from ..errors import param_ref
from ..models.batching import PREDICTION_LOGITS, Batch, Halving, batch_tokens, collate, cut, out_of_memory
from ..models.forward import cache_name, forward_parameters, logits_at
from ..reporter import Reporter
from .label_likelihood import label_probabilities, tree_layout

if TYPE_CHECKING:
    from peft import PeftModel

_MIN_PREFIX = 8  # a shorter common prefix is not worth its own pass
_DISAGREES = 0.05  # relative; rounding in bfloat16 is far below, a token that attends to others than its own far above
# Models that were tried: `Predictor._attends`, and `Predictor._shares`.
_attending: WeakKeyDictionary[PeftModel, bool] = WeakKeyDictionary()
_sharing: WeakKeyDictionary[PeftModel, bool] = WeakKeyDictionary()


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
        return self._vocabulary

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def common_prefix(self, items: Sequence[EncodedExample]) -> list[int]:
        """Return the tokens that all items begin with, before any scored position, if a pass can run them once."""
        if self.task == "classify" or len(items) < 2:
            return []
        length = min(common_length([item.ids for item in items]), min(item.positions[0] for item in items))
        prefix = list(items[0].ids[:length])
        return prefix if length >= _MIN_PREFIX and self._shares(prefix, 1) else []

    def batches(self, items: Sequence[EncodedExample], skip: int, copies: int) -> list[Batch]:
        """Cut items (sorted by length) into batches; `copies` draws at once share the budget of tokens."""
        tokens = batch_tokens(self.device.type)
        if self.task == "generate":
            tokens = min(tokens, PREDICTION_LOGITS // self.classes(items))

        def fits(part: Sequence[EncodedExample]) -> bool:
            labels, longest = part[0].candidates, part[-1]
            if longest.candidates != labels:
                return False
            if self._batch_size is not None:
                return len(part) <= self._batch_size
            rows, below = len(part) * copies, 0 if labels is None else len(label_tree(labels)) - 1
            logits = rows * below * self._vocabulary if below else 0
            return rows * (len(longest.ids) - skip + below) <= tokens and logits <= PREDICTION_LOGITS

        batches: list[Batch] = []
        slot = 0
        for part in cut(items, fits):
            batches.append(collate(part, self.model, skip, slot))
            slot += len(batches[-1].slots)
        return batches

    def predict(self, batch: Batch, cache: Any, copies: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (part, probabilities (copies, m, classes)) for parts of the batch, smaller when the memory runs out.

        Raises:
            IVONError: one prompt alone is too large.
        """
        length = batch.ids.shape[1] + (len(batch.tree) - 1 if batch.tree else 0)
        hopeless = f"prompt of {length} tokens; use {param_ref('load_in')} 8bit or 4bit, or a machine with more memory"

        def run(start: int, stop: int) -> tuple[Batch, Tensor]:
            part = batch.part(start, stop)
            return part, self._forward(part, cache, copies)

        for _, _, predicted in self._halving(len(batch), run, hopeless, cost=copies * length):
            yield predicted

    def _forward(self, batch: Batch, cache: Any, copies: int) -> Tensor:
        if self.task == "classify":
            inputs: dict[str, Any] = {"input_ids": batch.ids.repeat(copies, 1)}
            if batch.mask is not None:
                inputs["attention_mask"] = batch.mask.repeat(copies, 1)
            return self.model(**inputs).logits.view(copies, len(batch), -1).double().softmax(-1)
        if batch.tree is None:
            return self._at(batch.ids, batch.mask, batch.row, batch.column, cache, copies).float().softmax(-1)
        if len(batch.tree) > 1 and self._attends(batch, batch.tree, cache, copies):
            nodes = self._tree_logits(batch, batch.tree, cache, copies)
        else:
            nodes = self._line_logits(batch, batch.tree, batch.tree.leaves(), cache, copies)
        return label_probabilities(nodes, batch.tree)

    def _at(
        self,
        ids: Tensor,
        mask: Tensor | None,
        row: Tensor,
        column: Tensor,
        cache: Any,
        copies: int,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [copies, m, vocabulary] at `row` and `column` (m,) of `ids`, which follow the `cache`."""
        inputs: dict[str, Any] = {"input_ids": ids.repeat(copies, 1)}
        if mask is not None:
            inputs["attention_mask"] = mask.repeat(copies, *[1] * (mask.dim() - 1))
        if positions is not None:
            inputs["position_ids"] = positions.repeat(copies, 1)
        if cache is not None:  # a new one, in which every row stands once for each of the batch
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            rows = [(k.repeat_interleave(len(ids), 0), v.repeat_interleave(len(ids), 0)) for k, v in pairs]
            inputs[cache_name(self._takes)] = type(cache)(ddp_cache_data=rows)
        return logits_at(self.model, self._takes, inputs, row, column, copies)

    def _tree_logits(self, batch: Batch, tree: LabelTree, cache: Any, copies: int) -> Tensor:
        """Return the logits [copies, rows, nodes, vocabulary] of every node of the tree, from one pass."""
        rows, width = batch.ids.shape
        layout = tree_layout(tree, batch.column, width, 0 if cache is None else cache.layers[0].keys.shape[2])
        seen = layout.seen
        if self._attention != "sdpa":  # others add their mask
            seen = torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, torch.finfo(torch.float32).min)
        row = torch.arange(rows, device=self.device)[:, None].expand_as(layout.column)
        ids = torch.cat([batch.ids, layout.tokens.expand(rows, -1)], 1)
        logits = self._at(ids, seen, row.flatten(), layout.column.flatten(), cache, copies, layout.positions)
        return logits.view(copies, rows, len(tree), -1)

    def _line_logits(self, batch: Batch, tree: LabelTree, leaves: Sequence[int], cache: Any, copies: int) -> Tensor:
        """Return the same from one pass for each of `leaves`: 0 for nodes that are neither a leaf nor before one."""
        rows, width = batch.ids.shape
        skip = 0 if cache is None else cache.layers[0].keys.shape[2]
        result = torch.empty(0)
        each = torch.arange(rows, device=self.device)
        for leaf in leaves:
            line = tree.line(leaf)
            tokens = torch.tensor([tree.tokens[node] for node in line], dtype=torch.long, device=self.device)
            ids = torch.nn.functional.pad(batch.ids, (0, len(line)))
            columns = batch.column[:, None] + torch.arange(len(line) + 1, device=self.device)
            row = each[:, None].expand_as(columns)
            ids[row[:, 1:], columns[:, 1:]] = tokens
            mask = torch.arange(skip + width + len(line), device=self.device) <= skip + columns[:, -1:]
            whole = None if mask.all() else mask.long()
            logits = self._at(ids, whole, row.flatten(), columns.flatten(), cache, copies)
            if not len(result):
                result = logits.new_zeros(copies, rows, len(tree), logits.shape[-1])
            result[:, :, [0, *line]] = logits.view(copies, rows, len(line) + 1, -1)
        return result

    @property
    def _attention(self) -> str | None:
        return getattr(self.model.config.get_text_config(), "_attn_implementation", None)

    def _attends(self, batch: Batch, tree: LabelTree, cache: Any, copies: int) -> bool:
        """Say whether the model attends in trees: tried once for a model, on one prompt with two of the labels."""
        if self.model not in _attending:
            _attending[self.model] = (
                self._attention in ("sdpa", "eager")
                and "position_ids" in self._takes
                and self._shares(batch.ids[0].tolist(), copies)
                and self._agrees(batch.part(0, 1), tree, cache, copies)
            )
        return _attending[self.model]

    def _agrees(self, batch: Batch, tree: LabelTree, cache: Any, copies: int) -> bool:
        leaves = tree.leaves()
        leaves = [leaves[0], max(leaves, key=tree.depths.__getitem__)]
        nodes = [0, *tree.line(leaves[0]), *tree.line(leaves[1])]
        try:
            one = self._tree_logits(batch, tree, cache, copies)[:, :, nodes].float()
        except Exception as error:  # a model may refuse such a mask in any way
            if out_of_memory(error):
                raise
            return False
        other = self._line_logits(batch, tree, leaves, cache, copies)[:, :, nodes].float()
        return bool((one - other).norm() <= _DISAGREES * (other - other.mean(-1, keepdim=True)).norm())

    def _shares(self, ids: Sequence[int], copies: int) -> bool:
        """Say whether the model has a cache that batches can share: tried once for a model, on a token of a prompt."""
        if self.model not in _sharing:
            _sharing[self.model] = self.cache(ids[:1], copies) is not None
        return _sharing[self.model]

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
