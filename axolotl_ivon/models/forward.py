"""Forward passes through a loaded model: what their arguments are called, and batches that fit the memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..errors import IVONError

if TYPE_CHECKING:
    from peft import PeftModel

_T = TypeVar("_T")


def forward_parameters(model: PeftModel) -> Set[str]:
    """Return the names of the arguments that the base model's `forward` takes."""
    return inspect.signature(model.get_base_model().forward).parameters.keys()


def cache_name(parameters: Set[str]) -> str:
    """Return what `forward`, of these `parameters`, calls its key-value cache, as an argument and in its output.

    It is `cache` from transformers 5.24 on, `past_key_values` before.
    """
    return "cache" if "cache" in parameters else "past_key_values"


def run_halving(
    run: Callable[[int], _T], size: int, what: str, notify: Callable[[str], None], hopeless: str
) -> tuple[_T, int]:
    """Return (`run(size)`, size), at half the size each time that the memory runs out.

    Args:
        what: what a batch holds `size` of; `notify` is told whenever there will be fewer.
        hopeless: the message where not even one fits.

    Raises:
        IVONError: the memory runs out at size 1.
    """
    while True:
        try:
            return run(size), size
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        # Only here, after the exception, does nothing hold the tensors that did not fit.
        clear_device_cache(garbage_collection=True)
        if size == 1:
            raise IVONError(f"out of memory with a single {hopeless}")
        notify(f"out of memory with {size} {what} in a batch; going on with {size // 2}")
        size //= 2
