"""Forward passes through a loaded model: names of arguments, and a token at a time."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import IVONError, param_ref

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def forward_parameters(model: PeftModel) -> Set[str]:
    """Return the names of the arguments that the base model's `forward` takes."""
    return inspect.signature(model.get_base_model().forward).parameters.keys()


def cache_name(parameters: Set[str]) -> str:
    """Return what `forward`, of these `parameters`, calls its key-value cache, as an argument and in its output.

    It is `cache` from transformers 5.24 on, `past_key_values` before.
    """
    return "cache" if "cache" in parameters else "past_key_values"


def logits_at(
    model: PeftModel, takes: Set[str], inputs: dict[str, Any], row: Tensor, column: Tensor, copies: int = 1
) -> Tensor:
    """Return the logits [copies, m, classes] at `row` and `column` (m,) of a batch that stands in `inputs` so often.

    The head runs on these columns alone where `forward` takes (`takes`) them. A classifier has no columns.
    """
    if "use_cache" in takes:
        inputs["use_cache"] = False
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"], column = torch.unique(column, return_inverse=True)
    logits = model(**inputs).logits
    logits = logits.view(copies, -1, *logits.shape[1:])
    return logits[:, row] if logits.dim() == 3 else logits[:, row, column]


class CachedForward:
    """The forward pass of a language model over the newest tokens, the earlier ones in its key-value cache."""

    def __init__(self, model: PeftModel) -> None:
        self._model, self._takes = model, forward_parameters(model)
        self._cache = cache_name(self._takes)

    def __call__(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the last position's logits, float32, shape (rows, vocabulary), and the cache.

        Args:
            ids: the newest tokens, shape (rows, tokens), padded on the left.
            mask: 1 where a token is, for those in the cache too, shape (rows, all tokens).
            cache: what the pass before has returned; None in the first.

        Raises:
            IVONError: the model has no cache whose rows can be repeated.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if cache is not None:
            inputs[self._cache] = cache
        if "position_ids" in self._takes:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        result = self._model(**inputs)
        cache = getattr(result, self._cache, None)
        if not hasattr(cache, "reorder_cache"):
            raise IVONError(
                f"the base model has no key-value cache that can be repeated; serve it, and use {param_ref('endpoint')}"
            )
        return result.logits[:, -1].float(), cache


def end_tokens(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that end an output."""
    base: Any = model.get_base_model()
    ends = base.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
