"""How training begins what it trains: the tokens before the answers, which generation has to begin with too.

A chat template may write more there than its generation prompt, or less: an opened `<think>` for data with reasoning,
an empty block for data without. Only the tokens that were trained on say which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_MOST_ROWS = 256
_LONGEST = 64  # tokens
_GAP = 4  # between an answer's last token and the end-of-sequence token that belongs to its turn


def generation_prompt(tokenizer: Any, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Return the text that most rows have just before their last trained turn, as far as they agree; None if nothing.

    Args:
        tokenizer: decodes it.
        rows: token ids, and the places of those that are trained, ascending.
    """
    contexts = []
    for ids, trained in rows:
        begins = [(0, place) if not i else (trained[i - 1] + 1, place) for i, place in enumerate(trained)]
        turns = [(end, place) for i, (end, place) in enumerate(begins) if place - end >= (_GAP if i else 1)]
        if turns:
            end, place = turns[-1]
            contexts.append(ids[end:place][::-1])
    shared: list[int] = []
    rest = contexts
    while len(shared) < _LONGEST and (next_tokens := Counter(c[len(shared)] for c in rest if len(c) > len(shared))):
        token, count = next_tokens.most_common(1)[0]
        if 2 * count <= len(contexts):
            break
        rest = [c for c in rest if len(c) > len(shared) and c[len(shared)] == token]
        shared.append(token)
    return str(tokenizer.decode(shared[::-1], clean_up_tokenization_spaces=False)) if shared else None


def trained_generation_prompt(trainer: Any) -> str | None:
    """Return `generation_prompt` of a Trainer's data; None unless they are tokenised rows that say what is trained."""
    tokenizer, data = getattr(trainer, "processing_class", None), trainer.train_dataset
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    columns = getattr(data, "column_names", None) or ()
    marks = next((name for name in ("labels", "assistant_masks", "completion_mask") if name in columns), None)
    if marks is None or "input_ids" not in columns or not hasattr(data, "__len__") or not hasattr(tokenizer, "decode"):
        return None
    untrained = -100 if marks == "labels" else 0
    chosen = (data[number] for number in range(0, len(data), max(1, len(data) // _MOST_ROWS)))
    return generation_prompt(
        tokenizer,
        (
            ([int(id) for id in row["input_ids"]], [i for i, mark in enumerate(row[marks]) if mark != untrained])
            for row in chosen
        ),
    )
