"""What the tokens that are trained on say: how chats and answers begin, and which answers there are, if few labels.

A chat template may write more before an answer than its generation prompt, or less: an opened `<think>` for data with
reasoning, an empty block for data without. Only the tokens that were trained on say which.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..storage.labels import LONGEST_LABEL, MOST_LABELS, are_labels

# Of tokenised data: token ids, and the places of those that are trained, ascending.
Row = tuple[Sequence[int], Sequence[int]]
_MOST_ROWS = 256
_LONGEST = 64  # tokens
_GAP = 4  # between an answer's last token and the end-of-sequence token that belongs to its turn


def generation_prompt(tokenizer: Any, rows: Iterable[Row]) -> str | None:
    """Return the text that most rows have just before their last trained turn, as far as they agree; or None."""
    contexts = []
    for ids, trained in rows:
        if turns := _turns(trained):
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


_SYSTEM, _USER = "zzsystemzz", "[[turn]]"  # contents to find in what a chat template writes


def system_prompt(tokenizer: Any, rows: Iterable[Row]) -> str | None:
    """Return what the system turn that all rows share says; None without one, or if the template writes it by itself.

    It must be a turn of its own: in the user's turn (Gemma, Mistral) nothing tells it from what the user says.
    """
    before = [ids[: trained[0]] for ids, trained in rows if trained]
    shared = [ids[0] for ids in itertools.takewhile(lambda ids: len({*ids}) == 1, zip(*before, strict=False))]
    text = str(tokenizer.decode(shared, clean_up_tokenization_spaces=False))
    turn = {"role": "user", "content": _USER}

    def rendered(*messages: Mapping[str, str]) -> str:
        whole = str(tokenizer.apply_chat_template([*messages, turn], tokenize=False))
        return whole.partition(_USER)[0].rstrip()

    try:
        begin, _, end = rendered({"role": "system", "content": _SYSTEM}).partition(_SYSTEM)
        content, ended, _ = text.removeprefix(begin).partition(end)
        if not (end and ended and text.startswith(begin) and content.strip()) or text.startswith(rendered()):
            return None
        system = {"role": "system", "content": content}
        return content if text.startswith(rendered(system)) else None
    except Exception:  # a template may do anything, and there may be none
        return None


def _turns(trained: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each turn in ascending places where the one before ends, and where it begins."""
    begins = [(0, place) if not i else (trained[i - 1] + 1, place) for i, place in enumerate(trained)]
    return [(end, place) for i, (end, place) in enumerate(begins) if place - end >= (_GAP if i else 1)]


def answers_in(row: Row) -> list[list[int]]:
    """Return the places of the trained tokens of every turn of a row."""
    ids, trained = row
    turns = _turns(trained)
    ends = [*(end for end, _ in turns[1:]), len(ids)][: len(turns)]
    return [[i for i in trained if place <= i < end] for (_, place), end in zip(turns, ends, strict=True)]


def answers_to_choose_from(tokenizer: Any, rows: Iterable[Row]) -> list[str] | None:
    """Return the different answers if there are several and they `are_labels`, sorted; else None.

    An answer is the text that the chat template makes the trained tokens of, without blanks that it adds.
    """
    special, counts = set(getattr(tokenizer, "all_special_ids", ())), Counter[tuple[int, ...]]()
    before: dict[tuple[int, ...], tuple[int, ...]] = {}  # by the tokens of an answer, those before it
    for row in rows:
        ids = row[0]
        for places in answers_in(row):
            own = (ids[i] for i in places)
            tokens = tuple(itertools.takewhile(lambda id: id not in special, own))  # what ends the turn is no answer
            before.setdefault(tokens, tuple(ids[max(0, places[0] - 2) : places[0]]))
            counts[tokens] += 1
            if len(before) > MOST_LABELS or not 0 < len(tokens) <= LONGEST_LABEL:
                return None
    choices = Counter[str]()
    for tokens, context in before.items():
        text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        choice = next(
            (each for each in (text.strip(), text.rstrip(), text) if _is_rendered(tokenizer, each, context, tokens)), ""
        )
        if not choice:
            return None
        choices[choice] += counts[tokens]
    return sorted(choices) if len(choices) > 1 and are_labels(choices) else None


def _is_rendered(tokenizer: Any, answer: str, context: Sequence[int], tokens: Sequence[int]) -> bool:
    """Say whether the chat template makes `tokens`, after `context`, of an answer."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may do anything, and there may be none
        return False
    ids, wanted = tokenizer(text, add_special_tokens=False)["input_ids"], [*context, *tokens]
    return any(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))


def header_of_data(trainer: Any) -> dict[str, str]:
    """Return `data_header` of the tokenised rows of a Trainer's data; nothing where they do not say what is trained."""
    tokenizer, rows = _tokenizer(trainer), _rows_of(trainer)
    return data_header(tokenizer, rows) if rows and hasattr(tokenizer, "decode") else {}


def next_tokens_of_answers(trainer: Any) -> dict[tuple[int, ...], list[int]]:
    """Return which tokens follow each beginning of an answer of a Trainer's data, in ascending order.

    The special token that ends an answer is one of them. Meant for data whose answers are a few labels.
    """
    special, rows = set(getattr(_tokenizer(trainer), "all_special_ids", ())), _rows_of(trainer)
    following: dict[tuple[int, ...], set[int]] = {}
    for row in rows(None) if rows else ():
        for places in answers_in(row):
            beginning: tuple[int, ...] = ()
            for token in (row[0][i] for i in places):
                following.setdefault(beginning, set()).add(token)
                if token in special:
                    break
                beginning = (*beginning, token)
    return {beginning: sorted(tokens) for beginning, tokens in following.items()}


def _tokenizer(trainer: Any) -> Any:
    tokenizer = getattr(trainer, "processing_class", None)
    return getattr(tokenizer, "tokenizer", tokenizer)  # of a processor


def _rows_of(trainer: Any) -> Callable[[int | None], Iterator[Row]] | None:
    """Return what yields about so many rows of a Trainer's data, or all; None where they do not say what is trained."""
    data = trainer.train_dataset
    columns = getattr(data, "column_names", None) or ()
    if isinstance(data, list) and data and isinstance(data[0], dict):
        columns = data[0]
    marks = next((name for name in ("labels", "assistant_masks", "completion_mask") if name in columns), "")
    if not (marks and "input_ids" in columns and hasattr(data, "__len__")):
        return None

    def rows(most: int | None) -> Iterator[Row]:
        untrained, count = -100 if marks == "labels" else 0, len(data)
        for number in range(0, count, max(1, count // most) if most else 1):
            row = data[number]
            if not hasattr(row[marks], "__len__") or getattr(row[marks], "ndim", 1) == 0:  # a classifier's label
                return
            trained = [i for i, mark in enumerate(row[marks]) if mark != untrained]
            yield [int(id) for id in row["input_ids"]], trained

    return rows


def data_header(tokenizer: Any, rows: Callable[[int | None], Iterable[Row]]) -> dict[str, str]:
    """Return `generation_prompt`, `system_prompt` and `choices` for the header of σ, where there are any.

    `rows` returns about so many rows of the data, evenly spread, or all.
    """
    header = {
        "generation_prompt": generation_prompt(tokenizer, rows(_MOST_ROWS)),
        "system_prompt": system_prompt(tokenizer, rows(_MOST_ROWS)),
    }
    if choices := answers_to_choose_from(tokenizer, rows(None)):
        header["choices"] = json.dumps(choices, ensure_ascii=False)
    return {name: value for name, value in header.items() if value}
