"""Chat data for evaluation: the JSONL that axolotl trains on, one conversation a line.

A line holds `{"messages": [{"role": …, "content": …}, …]}`; `conversations` with `from`/`value` (the older
ShareGPT spelling) is read as well, and `{"text": …, "label": …}` as a one-turn chat. The question is everything
before the last assistant message; that message is the reference answer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import IVONError, param_ref
from ..storage.format import read_lines

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Example:
    """One question with its reference answer; `source` is `FILE:LINE`, for messages to the user.

    `plain` marks a `text`/`label` line, which a classifier reads without a chat template.
    """

    messages: tuple[dict[str, str], ...]
    answer: str
    source: str
    plain: bool = False

    @property
    def line(self) -> int:
        """The number of its line in the file, from 1."""
        return int(self.source.rsplit(":", 1)[1])


def read_examples(path: str | Path, limit: int | None = None, name: str = "data") -> list[Example]:
    """Read the questions and reference answers of a JSONL file of chats, at most the first `limit`.

    Raises:
        IVONError: the file, which the parameter `name` gave, cannot be read or holds no line; a line is not JSON, or
            has no conversation, no assistant message, or nothing before it.
    """
    return [_example(record, source) for source, record in itertools.islice(read_lines(path, name), limit)]


def read_files(paths: Iterable[str | Path], limit: int | None, name: str) -> dict[str, list[Example]]:
    """Read several files as `read_examples` does, by the name of the file; raise IVONError if one is given twice."""
    files: dict[str, list[Example]] = {}
    for path in paths:
        if Path(path) in map(Path, files):
            raise IVONError(f"{param_ref(name)} {path} is given twice; give each file once")
        files[str(path)] = read_examples(path, limit, name)
    return files


def _example(record: dict[str, Any], source: str) -> Example:
    messages = chat_messages(record, source)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise IVONError(f"{source}: no assistant message; the last one is the reference answer, add it")
    if last == 0:
        raise IVONError(f"{source}: nothing comes before the assistant message; add the question")
    if not messages[last]["content"]:
        raise IVONError(f"{source}: the assistant message is empty; it is the reference answer, fill it in")
    return Example(tuple(messages[:last]), messages[last]["content"], source, plain="text" in record)


def chat_messages(record: dict[str, Any], source: str) -> list[dict[str, str]]:
    """Return the chat of one line of a file, as `role` and `content`; raise IVONError if `source` holds none."""
    wanted = '{"messages": [{"role": …, "content": …}, …]}'
    turns: Any = record.get("messages", record.get("conversations"))
    if "messages" not in record and {"text", "label"} <= record.keys():
        pairs = {"user": record["text"], "assistant": str(record["label"])}
        turns = [{"role": role, "content": content} for role, content in pairs.items()]
    if not isinstance(turns, list):
        raise IVONError(f"{source}: no list `messages`; each line must be {wanted}")
    messages = []
    for position, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            text = f"message {position} has no text `role` and `content`"
            raise IVONError(f"{source}: {text}; each line must be {wanted}")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def detect_task(examples: Sequence[Example]) -> str:
    """Return "choice" if the answers look like a few strings to choose from, else "generate".

    They do if there are at most 26 different ones, each one line of at most 40 characters, and either each is
    a single character or they repeat (on average every answer occurs at least twice).
    """
    answers = {example.answer for example in examples}
    few = len(answers) <= 26
    short = all(len(answer) <= 40 and "\n" not in answer for answer in answers)
    repeated = 2 * len(answers) <= len(examples) or all(len(answer.strip()) == 1 for answer in answers)
    return "choice" if few and short and repeated else "generate"


def choose_task(
    examples: Sequence[Example], has_head: bool, task: str | None = None, choices: Sequence[str] | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return how examples are predicted, "choice", "generate" or "classify", and the strings to choose from.

    By default the task is "classify" where the adapter has a classification head, "choice" where `choices` are given,
    else as `detect_task` finds. A task that the adapter was not trained for is refused.
    """
    if task is None:
        task = "classify" if has_head else "choice" if choices else detect_task(examples)
    if (task == "classify") != has_head:
        head = "with a classification head" if has_head else "without a classification head"
        raise IVONError(f"{param_ref('task')} {task}: the adapter was trained {head}; leave {param_ref('task')} out")
    return task, find_choices(examples, choices) if task == "choice" else ()


def find_choices(examples: Sequence[Example], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the strings to choose from: `given`, or the different answers of the data, sorted.

    Fewer than two, one given twice, or an answer that is none of them is an IVONError.
    """
    choices = tuple(sorted({example.answer for example in examples}) if given is None else given)
    if given is None and len(choices) < 2:
        raise IVONError(
            f"{param_ref('task')} choice: every answer in the data is {choices[0]!r}; name the others with "
            f"{param_ref('choices')} A,B"
        )
    named = f"{param_ref('choices')} {','.join(choices)}"
    if len(choices) < 2 or len(set(choices)) < len(choices) or "" in choices:
        raise IVONError(f"{named}: give at least two different, non-empty strings")
    for example in examples:
        if example.answer not in choices:
            raise IVONError(f"{example.source}: the answer {example.answer!r} is not one of {named}")
    return choices


class Chat(NamedTuple):
    """One line of a prompts file: the messages, the reference answer if there is one, and `FILE:LINE`."""

    messages: tuple[dict[str, str], ...]
    reference: str | None
    source: str


def read_chats(path: str | Path, limit: int | None = None) -> list[Chat]:
    """Read the prompts of a JSONL file of chats, as axolotl trains on; at most the first `limit`.

    An assistant message at the end is the reference answer; a chat may also end with the question. A file without
    lines, or a line without a user turn, is an IVONError.
    """
    chats: list[Chat] = []
    for source, record in itertools.islice(read_lines(path, "prompts"), limit):
        messages = chat_messages(record, source)
        answered = messages and messages[-1]["role"] == "assistant"
        reference = messages.pop()["content"] or None if answered else None
        if not any(message["role"] == "user" for message in messages):
            raise IVONError(f"{source}: no user turn; add the question as a message with role user")
        if any(re.search("[\ud800-\udfff]", message["content"]) for message in messages):
            raise IVONError(f"{source}: holds half a surrogate pair (\\ud800 to \\udfff), which is no text; remove it")
        chats.append(Chat(tuple(messages), reference, source))
    return chats
