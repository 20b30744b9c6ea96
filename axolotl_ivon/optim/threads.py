"""Work on many small pieces in several threads."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

# Of the time for a piece about a fifth goes into Python, which runs in one thread at a time.
_MOST_THREADS = 4
# With fewer pieces than this a thread waits for Python more than it works.
_PIECES_EACH = 2


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="axolotl-ivon")


def in_parallel(function: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """Return `function` of every piece, without gradients, from up to `torch.get_num_threads()` threads.

    Each thread, this one included, takes the next piece when it is done with one, so a core that is busy elsewhere
    costs its share only. When this returns or raises no piece is being worked on.
    """
    left = iter(enumerate(pieces))
    results: dict[int, Result] = {}

    def work() -> None:
        with torch.no_grad():
            for number, piece in left:
                results[number] = function(piece)

    helpers = max(1, min(torch.get_num_threads(), _MOST_THREADS, len(pieces) // _PIECES_EACH)) - 1
    # The process is part of the key since a fork has none of its parent's threads.
    futures = [_pool(helpers, os.getpid()).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        wait(futures)
    for future in futures:
        future.result()
    return [results[number] for number in range(len(pieces))]
