"""Reading chats: what is asked, what is right, and one line of complaint for every bad file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.data.chats import (
    Example,
    choose_task,
    detect_task,
    find_choices,
    odd_choices,
    read_chats,
    read_examples,
    read_questions,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def refuses(read: Callable[[Path], object], folder: Path, lines: list[object] | bytes | None, message: str) -> None:
    path = write(folder, *lines) if isinstance(lines, list) else folder / "data.jsonl"
    if isinstance(lines, bytes):
        path.write_bytes(lines)
    with pytest.raises(IVONError, match=message) as caught:
        read(path)
    assert "data.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


chat = functools.partial(tiny.chat, "which?")


def examples(*answers: str) -> list[Example]:
    return [Example(({"role": "user", "content": "?"},), answer, f"f:{i}") for i, answer in enumerate(answers)]


@given(turns=st.lists(TURN, min_size=1, max_size=4), answer=TEXT, after=st.lists(TURN, max_size=2))
def test_everything_before_the_last_assistant_message_is_asked(
    tmp_path_factory: pytest.TempPathFactory, turns: list[dict], answer: str, after: list[dict]
) -> None:
    after = [turn for turn in after if turn["role"] != "assistant"]
    messages = [*turns, {"role": "assistant", "content": answer}, *after]
    path = write(tmp_path_factory.mktemp("data"), {"messages": messages})
    [example] = read_examples(path)
    assert list(example.messages) == turns
    assert example.answer == answer
    assert example.source == f"{path}:1"


SHAPES: dict[str, tuple[dict, list[tuple[str, str]]]] = {
    "messages": ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
                 [("user", "hi"), ("assistant", "yo")]),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                            {"role": "assistant", "content": "yo"}]}, [("user", "hi"), ("assistant", "yo")]),
    "system": ({"system": "be good", **chat("yo")}, [("system", "be good"), ("user", "which?"), ("assistant", "yo")]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
                 [("user", "hi"), ("assistant", "yo")]),
    "text, label": ({"text": "fine", "label": 1}, [("user", "fine"), ("assistant", "1")]),
    "alpaca": ({"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n1 2"), ("assistant", "3")]),
    "alpaca without input": ({"instruction": "add", "input": "", "output": "3"}, [("user", "add"), ("assistant", "3")]),
}  # fmt: skip


@pytest.mark.parametrize("label", ["a b", 3, 10**400, 0.5, True], ids=lambda label: str(label)[:9])
def test_a_label_is_a_text_or_a_number(tmp_path: Path, label: object) -> None:
    [example] = read_examples(write(tmp_path, {"text": "fine", "label": label}))
    assert example.answer == str(label)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_line_is_a_chat(tmp_path: Path, shape: str) -> None:
    record, turns = SHAPES[shape]
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n", encoding="utf-8-sig")  # as Windows saves it
    [example], [prompt] = read_examples(path), read_chats(path)
    assert [(turn["role"], turn["content"]) for turn in example.turns] == turns
    assert (example.source, example.plain) == (f"{path}:2", "text" in record)
    assert (prompt.messages, prompt.answer) == (example.messages, example.answer)


def test_all_fields_of_a_message_are_kept_as_axolotl_gives_them_to_the_template(tmp_path: Path) -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    parameters = {"type": "object"}
    turns = [
        {"role": "user", "content": "hi", "name": "bob", "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "assistant", "content": "seven", "reasoning_content": "it said 7"},
        {"role": "user", "content": "thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": json.dumps(parameters)}}]
    path = write(tmp_path, {"messages": turns, "tools": json.dumps(tools)}, {"messages": turns[:2], "tools": None})
    whole, called = read_examples(path)
    assert whole.turns == [
        {"role": "user", "content": "hi", "name": "bob"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]},
        *turns[2:],
    ]
    assert (
        whole.tools
        == read_chats(path)[0].tools
        == [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    )
    assert (called.answer, called.tools, called.turns) == ("", None, whole.turns[:2])
    assert detect_task([whole] * 4) == "generate"


@pytest.mark.parametrize("shape", [name for name, (record, _) in SHAPES.items() if "text" not in record])
def test_a_text_beside_a_chat_is_not_read(shape: str, tmp_path: Path) -> None:
    """As of data sets that hold the rendered prompt with its answer in a column `text` as well; or nulls."""
    record, _ = SHAPES[shape]
    empty = dict.fromkeys(("messages", "text", "label"))
    path = write(tmp_path, record, {**record, "text": "rendered: the answer"}, {**empty, **record})
    for read in (read_examples, read_chats, lambda path: list(read_questions(path))):
        plain, *others = read(path)
        assert [replace(other, source=plain.source) for other in others] == [plain] * 2
        assert not plain.plain


def test_null_columns_are_passed_over(tmp_path: Path) -> None:
    """As of data sets of several kinds that were joined."""
    empty = dict.fromkeys(("messages", "conversations", "instruction", "input", "output", "system", "label"))
    path = write(
        tmp_path,
        {"text": "T", **empty},
        {**empty, "text": "rendered: I O", "instruction": "I", "output": "O"},
        {**empty, "text": "rendered: I", "instruction": "I"},
        {**empty, "text": "T", "label": "L"},
    )
    asked = [("T", ""), ("I", "O"), ("I", ""), ("T", "L")]
    assert [(prompt.messages[-1]["content"], prompt.answer) for prompt in read_chats(path)] == asked
    questions = list(read_questions(path))
    assert [(question.messages[-1]["content"], question.answer) for question in questions] == [
        (a, "") for a, _ in asked
    ]
    answered = write(tmp_path, {**empty, "text": "rendered: I O", "instruction": "I", "output": "O"})
    assert [(example.messages[-1]["content"], example.answer) for example in read_examples(answered)] == [("I", "O")]


def test_prompts_may_be_texts(tmp_path: Path) -> None:
    records = [{"text": "hi"}, {"text": "hi", "label": "A"}, {"instruction": "hi"}, {"text": "hi", "system": "short"}]
    prompts = read_chats(write(tmp_path, *records))
    assert [(prompt.messages[-1]["content"], prompt.answer) for prompt in prompts] == [
        ("hi", a) for a in ("", "A", "", "")
    ]
    assert [prompt.plain for prompt in prompts] == [True, True, False, True]
    assert [replace(prompt, answer="") for prompt in prompts] == list(read_questions(tmp_path / "data.jsonl"))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, chat("A"), chat("B"), "not JSON")
    assert [example.answer for example in read_examples(path, limit=2)] == ["A", "B"]
    assert [prompt.source for prompt in read_chats(path, 1)] == [f"{path}:1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["", "  "], "the file is empty"),
        ([chat("A"), "{oops"], r":2: not JSON"),
        (["9" * 5000], ":1: not JSON"),
        (["[" * 99999], ":1: not JSON"),
        ([chat("A"), "", "[1]"], r":3: not a JSON object"),
        ([{"prompt": "x"}], ":1: no list `messages`"),
        ([{"messages": "x"}], ":1: no list `messages`"),
        ([{"messages": [{"role": "user", "content": ["x"]}]}], "message 0 has a part of `content` that is no text"),
        ([{"messages": ["x"]}], "message 0 has no text"),
        ([{"messages": [{"role": "user", "content": "x"}]}], ":1: no assistant message"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "nothing comes before"),
        ([chat("")], "the assistant message is empty"),
        ([chat("A"), chat("A \ud83d")], ":2: holds half a surrogate pair"),
        ([{**chat("A"), "tools": "oops"}], ":1: `tools` is not JSON"),
        ([{**chat("A"), "tools": {"name": "f"}}], ":1: `tools` is no list"),
        ([{"messages": [{"role": "assistant", "tool_calls": 5}]}], ":1: message 0: `tool_calls` is no list"),
        ([{"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}], "message 0: `tool_calls` is no list"),
        ([{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}], "message 0 .* without `function`"),
        ([{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}], "is not JSON"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            "part of `content` .* no text",
        ),
        ([{"text": "x", "label": None}], ":1: `label` is null; give a text or a number"),
        (['{"text": "x", "label": NaN}'], ":1: `label` is NaN; give a text or a number"),
        (['{"text": "x", "label": 1e999}'], ":1: `label` is Infinity"),
        ([{"text": "x", "label": ["a"]}], ':1: `label` is \\["a"\\]'),
        (None, r"there is no such file"),
        (b'{"text": "caf\xe9"}\n', "not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_data_are_named(tmp_path: Path, lines: list[object] | bytes | None, message: str) -> None:
    refuses(read_examples, tmp_path, lines, message)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"messages": [{"role": "assistant", "content": "A"}]}], ":1: no user turn"),
        ([{"messages": [{"role": "system", "content": "A"}]}], ":1: no user turn"),
        ([{"messages": []}], ":1: no user turn"),
        ([chat("\ud83d")], ":1: holds half a surrogate pair"),
        (None, "prompts .*data.jsonl: cannot be read"),
    ],
    ids=str,
)
def test_bad_prompts_are_named(tmp_path: Path, lines: list[object] | None, message: str) -> None:
    refuses(read_chats, tmp_path, lines, message)


@pytest.mark.parametrize(
    ("answers", "task"),
    [
        (["A", "B", "A", "B"], "choice"),
        (["A", "B", "C"], "choice"),
        (["yes", "no", "yes", "no"], "choice"),
        (["Paris", "Rome", "Oslo"], "generate"),
        ([f"{i}" for i in range(50)] * 2, "generate"),
        ([f"intent {i}" for i in range(60)] * 2, "choice"),
        ([f"intent {i}" for i in range(60)] * 3 + [f"rare {i}" for i in range(20)], "choice"),
        ([f"intent {i}" for i in range(60)] * 3 + [f"rare {i}" for i in range(21)], "generate"),
        ([f"intent {i}" for i in range(201)] * 2, "generate"),
        (["a sentence that is rather too long to be a choice"] * 4, "generate"),
        (["two\nlines", "two\nlines", "x", "x"], "generate"),
    ],
)
def test_the_task_follows_from_the_answers(answers: list[str], task: str) -> None:
    assert detect_task(examples(*answers)) == task
    assert choose_task(examples(*answers), has_head=False)[0] == task
    assert choose_task(examples(*answers), False, choices=[*{*answers, "?"}])[0] == "choice"
    assert choose_task(examples(*answers), has_head=True) == ("classify", ())
    for has_head, wrong in ((False, "classify"), (True, task)):
        with pytest.raises(IVONError, match=f"task {wrong}: the adapter was trained with(out)? a classification head"):
            choose_task(examples(*answers), has_head, wrong)


NUMBERS = [f"{i}" for i in range(30)]


@pytest.mark.parametrize(
    ("answers", "trained", "expected"),
    [
        (["red", "blue"], ["red", "blue", "green"], ("choice", ("red", "blue", "green"))),
        (["red", "blue"], ["red", "green"], ("generate", ())),
        (["red", "blue"], [], ("generate", ())),
        (NUMBERS[:2], NUMBERS, ("choice", ("0", "1"))),  # of the data: digits; 30 numbers are amounts
        (NUMBERS[9:11], NUMBERS, ("generate", ())),
    ],
)
def test_an_evaluation_chooses_from_the_answers_of_training(
    answers: list[str], trained: list[str], expected: tuple[str, tuple[str, ...]]
) -> None:
    header = {"choices": json.dumps(trained)}
    assert choose_task(examples(*answers), False, header=header) == expected
    assert choose_task(examples(*answers), False, choices=answers[::-1], header=header)[1] == tuple(answers[::-1])


@pytest.mark.parametrize(
    ("answers", "odd"),
    [
        (["A", "B"] * 3, ""),
        (["A", "B", "C", "D", "E"], ""),
        (["yes", "no", "Yes", "no", "yes "], "'Yes' and 'yes' and 'yes ' differ in case or blanks alone"),
        (["A", "B"] * 5 + ["C"], "'C' occurs once"),
        (["A", "B"] * 5 + ["a", "C"], "'A' and 'a' differ in case or blanks alone; 'C', 'a' occur once"),
    ],
)
def test_choices_that_look_like_mistakes_are_named(answers: list[str], odd: str) -> None:
    warning = odd_choices(examples(*answers), find_choices(examples(*answers)))
    assert warning == (f"{odd}: each is a choice of its own; mend the data, or name the choices" if odd else "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "every answer in the data is 'A'"),
        (["A"], "at least two different"),
        (["A", "A"], "at least two different"),
        (["A", " A"], "at least two different"),
        (["A", "B", " "], "at least two different"),
        (["B", "C"], "f:0: the answer 'A' is not one of choices B,C"),
    ],
)
def test_choices_that_leave_nothing_to_choose(given: list[str] | None, message: str) -> None:
    assert find_choices(examples("no", "yes", "no")) == ("no", "yes")
    assert find_choices(examples("no", "yes"), ["yes", "no", "maybe"]) == ("yes", "no", "maybe")
    with pytest.raises(IVONError, match=message):
        find_choices(examples("A", "A"), given)
