"""Chat data: the JSONL that axolotl trains on, one conversation a line; `chat_messages` has the shapes of a line.

The question is everything before the last assistant message; that message is the reference answer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import IVONError, param_ref
from ..reporter import SILENT, Reporter
from ..storage.format import read_lines
from ..storage.labels import are_amounts, are_labels

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_SAID = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")  # beside the text of a message
Message = Mapping[str, Any]  # `role`, `content` (a text, where there is one), and whatever else a chat template reads


@dataclass(frozen=True)
class Example:
    """One question with its reference answer; `source` is `FILE:LINE`, for messages to the user.

    Attributes:
        messages: what comes before the answer.
        answer: the text of the answer; empty if it has other fields alone, as a call of a tool.
        plain: whether it is a `text`/`label` line, which a classifier reads without a chat template.
        more: the other fields of the answer's message (`tool_calls`, `reasoning_content`, …).
        after: messages that follow the answer, which is the last of the assistant.
        tools: the tools that the chat template describes to the model.
    """

    messages: tuple[Message, ...]
    answer: str
    source: str
    plain: bool = False
    more: Message = field(default_factory=dict)
    after: tuple[Message, ...] = ()
    tools: Sequence[Any] | None = None

    @property
    def line(self) -> int:
        """The number of its line in the file, from 1."""
        return int(self.source.rsplit(":", 1)[1])

    @property
    def question(self) -> str:
        """The text of the last message before the answer."""
        return str(self.messages[-1].get("content", ""))

    @property
    def turns(self) -> list[Message]:
        """The whole conversation."""
        content = {} if self.more and not self.answer else {"content": self.answer}
        return [*self.messages, {"role": "assistant", **content, **self.more}, *self.after]

    @property
    def says_more(self) -> bool:
        """Whether the answer is more than its text: reasoning, or calls of tools."""
        return any(self.more.get(name) for name in _SAID)


def read_examples(path: str | Path, limit: int | None = None, name: str = "data") -> list[Example]:
    """Read the questions and reference answers of a JSONL file of chats, at most the first `limit`.

    Raises:
        IVONError: the file, which the parameter `name` gave, cannot be read or holds no line; a line is not JSON, or
            has no conversation, no assistant message, or nothing before it.
    """
    return [_example(record, source) for source, record in _read(path, limit, name)]


def _read(path: str | Path, limit: int | None, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `FILE:LINE` and the object of each line."""
    return itertools.islice(read_lines(path, name), limit)


def read_files(
    paths: Iterable[str | Path],
    limit: int | None,
    name: str,
    read: Callable[[str | Path, int | None, str], list[Example]] = read_examples,
) -> dict[str, list[Example]]:
    """Read several files with `read`, by the name of the file; raise IVONError if one is given twice."""
    files: dict[str, list[Example]] = {}
    for path in paths:
        if Path(path) in map(Path, files):
            raise IVONError(f"{param_ref(name)} {path} is given twice; give each file once")
        files[str(path)] = read(path, limit, name)
    return files


def _example(line: dict[str, Any], source: str) -> Example:
    record = _given(line)
    messages, tools = chat_messages(line, source), chat_tools(record, source)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise IVONError(f"{source}: no assistant message; the last one is the reference answer, add it")
    if last == 0:
        raise IVONError(f"{source}: nothing comes before the assistant message; add the question")
    reply = {key: value for key, value in messages[last].items() if key != "role"}
    answer, after = reply.pop("content", "") or "", tuple(messages[last + 1 :])
    if not answer and "content" in messages[last]:
        reply["content"] = ""  # which is something else to a template than no content
    example = Example(tuple(messages[:last]), answer, source, _is_text(record), reply, after, tools)
    if not answer and not example.says_more:
        raise IVONError(f"{source}: the assistant message is empty; it is the reference answer, fill it in")
    return example


def _given(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line without its columns that are null, as data sets of several kinds have them when they are joined."""
    return {name: value for name, value in line.items() if value is not None}


def _is_text(record: Mapping[str, Any]) -> bool:
    """Return whether a line is a text, with its label or alone. Beside a chat a column `text` repeats it, rendered."""
    if {"messages", "conversations"} & record.keys():
        return False
    return "text" in record and ("label" in record or "instruction" not in record)


_SHAPE = '{"messages": [{"role": …, "content": …}, …]}'
_OTHER_SHAPES = "`conversations`, `text` and `label`, or `instruction` and `output`"


def chat_messages(line: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """Return the messages of one line of a file as axolotl gives them to the chat template, all their fields included.

    The line has `messages`, `conversations` (ShareGPT, with `from` and `value`), `text` and `label`, or `instruction`,
    `input` and `output` (Alpaca); `system` is put before messages that do not begin with one.

    Raises:
        IVONError: `source` holds no chat, half a surrogate pair, or a field of a message that cannot be rendered; it
            names the field.
    """
    record = _given(line)
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise IVONError(
            f"{source}: holds half a surrogate pair (\\ud800 to \\udfff), which is no text; remove it"
        ) from None
    turns: Any = record.get("messages", record.get("conversations"))
    if turns is None and _is_text(record) and "label" in line:
        turns = [_turn("user", record["text"]), _turn("assistant", _label(line["label"], source))]
    elif turns is None and {"instruction", "output"} <= record.keys():
        asked = [record["instruction"], record.get("input") or ""]
        text = "\n".join(filter(None, asked)) if all(isinstance(part, str) for part in asked) else None
        turns = [_turn("user", text), _turn("assistant", record["output"])]
    if not isinstance(turns, list):
        held = ", ".join(f"`{name}`" for name in line) or "nothing"
        there = f"no list `messages`, but {held}" if turns is None else "no list `messages`, but something else there"
        raise IVONError(f"{source}: {there}; each line must be {_SHAPE}, or have {_OTHER_SHAPES}")
    messages = [_message(turn, f"{source}: message {position}") for position, turn in enumerate(turns)]
    system = record.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages.insert(0, _turn("system", system))
    return messages


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _label(label: Any, source: str) -> str:
    """Return the label of a text as an answer: a text, or a number as Python writes it."""
    if isinstance(label, (str, int)) or (isinstance(label, float) and math.isfinite(label)):
        return str(label)
    raise IVONError(f"{source}: `label` is {json.dumps(label):.40}; give a text or a number, or remove the line")


def _message(turn: Any, named: str) -> dict[str, Any]:
    """Return a message without its empty fields; `named` says which it is."""
    given: dict[str, Any] = _without_nulls(turn) if isinstance(turn, dict) else {}
    role, content = (given.pop(name, given.pop(old, None)) for name, old in (("role", "from"), ("content", "value")))
    for old in ("from", "value"):
        given.pop(old, None)
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) and p.keys() <= {"type", "text"} else None for p in content]
        if not all(isinstance(text, str) for text in texts):
            raise IVONError(f"{named} has a part of `content` that is no text; give texts alone")
        content = "".join(map(str, texts))
    if not isinstance(role, str) or (
        not isinstance(content, str) if content is not None else not given.keys() & {*_SAID}
    ):
        raise IVONError(f"{named} has no text `role` and `content`; each line must be {_SHAPE}")
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list):
        raise IVONError(f"{named}: `tool_calls` is no list; give a list of calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise IVONError(f"{named} has a `tool_calls` without `function`; give name and arguments there")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _parsed(function["arguments"], f"{named}: `arguments` of `tool_calls`")
    text = {} if content is None else {"content": content}
    return {"role": _ROLES.get(role, role), **text, **given}


def chat_tools(record: dict[str, Any], source: str) -> list[Any] | None:
    """Return the `tools` of one line of a file as axolotl gives them to the chat template: JSON in texts is parsed."""
    tools = _without_nulls(record.get("tools"))
    if isinstance(tools, str):
        tools = _parsed(tools, f"{source}: `tools`")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise IVONError(f"{source}: `tools` is no list; give a list of functions")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            function["parameters"] = _parsed(function["parameters"], f"{source}: `parameters` of `tools`")
    return tools


def _parsed(text: str, named: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IVONError(f"{named} is not JSON ({error})") from None


def _without_nulls(value: Any) -> Any:
    """Return JSON without the fields that are null, as axolotl drops them."""
    return json.loads(json.dumps(value), object_hook=lambda held: {k: v for k, v in held.items() if v is not None})


def read_questions(path: str | Path, limit: int | None = None) -> Iterator[Example]:
    """Yield what is asked in each line of a JSONL file, as `question_of` takes it, without an answer.

    Raises:
        IVONError: as `read_examples`, but a line need not have an answer.
    """
    return (question_of(record, source) for source, record in _read(path, limit, "data"))


def read_texts(lines: Iterable[bytes], limit: int | None = None) -> Iterator[Example]:
    """Yield the same of lines of stdin; a line that is a JSON object is read as that of a file. Empty ones are skipped.

    Raises:
        IVONError: a line is not UTF-8, or a JSON object has no chat.
    """
    filled = ((number, line.rstrip(b"\r\n")) for number, line in enumerate(lines, start=1) if line.strip())
    for number, raw in itertools.islice(filled, limit):
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            why = f"not UTF-8 text ({error.reason} at byte {error.start})"
            raise IVONError(f"stdin:{number}: {why}; pipe in UTF-8, as `iconv -t UTF-8` makes it") from None
        record: Any = None
        if line.lstrip().startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
        yield question_of(record if isinstance(record, dict) else line, f"stdin:{number}")


def question_of(value: str | Sequence[Message] | Mapping[str, Any], source: str) -> Example:
    """Return what is asked by a text of a user, messages, or a line of a file; the answer after it is left out.

    A line may also be `{"text": …}`, or Alpaca's without `output`.

    Raises:
        IVONError: `source` holds no chat, or no turn of a user before the answer.
    """
    record = {"text": value} if isinstance(value, str) else {"messages": [*value]}
    if isinstance(value, Mapping):
        record = _given(value)
        if _is_text(record):
            record.pop("label", None)
    return replace(_prompt(record, source), answer="")


def _prompt(line: Mapping[str, Any], source: str) -> Example:
    """Return what is asked by a line of a file, and the answer after it, which is empty where there is none."""
    record = _given(line)
    plain = _is_text(record)
    if plain and "label" not in record:
        record["messages"] = [_turn("user", record["text"])]
    elif "instruction" in record:
        record.setdefault("output", "")
    messages, tools = chat_messages(record, source), chat_tools(record, source)
    answered = messages and messages[-1]["role"] == "assistant"
    reference = messages.pop().get("content", "") if answered else ""
    if not any(message["role"] == "user" and message.get("content", "").strip() for message in messages):
        raise IVONError(f"{source}: no user turn with a text; add the question")
    return Example(tuple(messages), reference, source, plain, tools=tools)


def detect_task(examples: Sequence[Example]) -> str:
    """Return "choice" if the answers are all there is of a turn and `are_labels`, else "generate"."""
    if any(example.says_more for example in examples):
        return "generate"
    return "choice" if are_labels(Counter(example.answer for example in examples)) else "generate"


def trained_choices(header: Mapping[str, str]) -> tuple[str, ...]:
    """Return the labels of the training data, from the header of σ; empty where training has not written them.

    Amounts, which earlier versions wrote, are none.
    """
    with contextlib.suppress(ValueError):
        choices = json.loads(header.get("choices") or "[]")
        if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
            return () if are_amounts(choices) else tuple(choices)
    return ()


def odd_choices(examples: Sequence[Example], choices: Sequence[str]) -> str:
    """Return in a line which of the choices that the data have look like mistakes; empty if none does.

    They differ in case or blanks alone, or occur once where another occurs at least five times.
    """
    counts = Counter(example.answer for example in examples)
    alike: dict[str, list[str]] = {}
    for choice in choices:
        alike.setdefault(" ".join(choice.casefold().split()), []).append(choice)
    warnings = [
        " and ".join(map(repr, same)) + " differ in case or blanks alone" for same in alike.values() if len(same) > 1
    ]
    once = [repr(choice) for choice in choices if counts[choice] == 1 and max(counts.values()) >= 5]
    warnings += [f"{', '.join(once)} {'occur' if len(once) > 1 else 'occurs'} once"] if once else []
    return f"{'; '.join(warnings)}: each is a choice of its own; mend the data, or name the choices" if warnings else ""


def choose_task(
    examples: Sequence[Example],
    has_head: bool,
    task: str | None = None,
    choices: Sequence[str] | None = None,
    header: Mapping[str, str] | None = None,
    reporter: Reporter = SILENT,
) -> tuple[str, tuple[str, ...]]:
    """Return how examples are predicted, "choice", "generate" or "classify", and the strings to choose from.

    By default the task is "classify" where the adapter has a classification head, "choice" where `choices` are given,
    else as `detect_task` finds. Where every answer is one of those of training, by the `header` of σ, these are the
    default of `choices`, so that an evaluation chooses from what a prediction chooses from. A task that the adapter was
    not trained for is refused. The reporter is notified of choices that look like mistakes, unless they were given.
    """
    given, trained = choices, trained_choices(header or {})
    if choices is None and trained and {example.answer for example in examples} <= {*trained}:
        choices = None if any(example.says_more for example in examples) else trained
    if task is None:
        task = "classify" if has_head else "choice" if choices else detect_task(examples)
    if (task == "classify") != has_head:
        head = "with a classification head" if has_head else "without a classification head"
        raise IVONError(f"{param_ref('task')} {task}: the adapter was trained {head}; leave {param_ref('task')} out")
    chosen = find_choices(examples, choices) if task == "choice" else ()
    if given is None and (odd := odd_choices(examples, chosen)):
        reporter.notify(odd)
    return task, chosen


def find_choices(examples: Sequence[Example], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the strings to choose from: `given`, or the different answers of the data, sorted.

    Fewer than two, one given twice (with other blanks around it, say), an empty one, or an answer that is none of them
    is an IVONError.
    """
    choices = tuple(sorted({example.answer for example in examples}) if given is None else given)
    if given is None and len(choices) < 2:
        raise IVONError(
            f"{param_ref('task')} choice: every answer in the data is {choices[0]!r}; name the others with "
            f"{param_ref('choices')} A,B"
        )
    named = f"{param_ref('choices')} {','.join(choices)}"
    stripped = {choice.strip() if given else choice for choice in choices}
    if len(choices) < 2 or len(stripped) < len(choices) or "" in stripped:
        raise IVONError(f"{named}: give at least two different, non-empty strings")
    for example in examples:
        if example.answer not in choices:
            raise IVONError(f"{example.source}: the answer {example.answer!r} is not one of {named}")
    return choices


def read_chats(path: str | Path, limit: int | None = None) -> list[Example]:
    """Read the prompts of a JSONL file of chats, as axolotl trains on, or of texts; at most the first `limit`.

    An assistant message at the end is the reference answer; it is empty where a chat ends with the question. A file
    without lines, or a line without a user turn, is an IVONError.
    """
    return [_prompt(record, source) for source, record in _read(path, limit, "prompts")]
