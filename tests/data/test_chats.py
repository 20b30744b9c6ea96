"""Reading chats: what is asked, what is right, and one line of complaint for every bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.data.chats import Example, detect_task, find_choices, read_chats, read_examples
from axolotl_ivon.storage.format import read_lines

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def chat(answer: str, question: str = "which?") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


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


def test_the_older_spelling_and_text_label_lines_are_chats_too(tmp_path: Path) -> None:
    old = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    path = write(tmp_path, old, "", {"text": "fine", "label": 1})
    first, second = read_examples(path)
    assert first == Example(({"role": "user", "content": "hi"},), "yo", f"{path}:1")
    assert second == Example(({"role": "user", "content": "fine"},), "1", f"{path}:3", plain=True)


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, chat("A"), chat("B"), "not JSON")
    assert [example.answer for example in read_examples(path, limit=2)] == ["A", "B"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        (["", "  "], "the file is empty"),
        ([chat("A"), "{oops"], r"data\.jsonl:2: not JSON"),
        ([chat("A"), "", "[1]"], r"data\.jsonl:3: not a JSON object"),
        ([{"prompt": "x"}], r"data\.jsonl:1: no list `messages`"),
        ([{"messages": "x"}], r"data\.jsonl:1: no list `messages`"),
        ([{"messages": [{"role": "user", "content": ["x"]}]}], "message 0 has no text"),
        ([{"messages": ["x"]}], "message 0 has no text"),
        ([{"messages": [{"role": "user", "content": "x"}]}], r"data\.jsonl:1: no assistant message"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "nothing comes before"),
        ([chat("")], "the assistant message is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(IVONError, match=message) as caught:
        read_examples(write(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(IVONError, match="there is no such file"):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(IVONError, match="cannot be read"):
        read_examples(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(IVONError, match="not UTF-8"):
        read_examples(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("answers", "task"),
    [
        (["A", "B", "A", "B"], "choice"),
        (["A", "B", "C"], "choice"),
        (["yes", "no", "yes", "no"], "choice"),
        (["Paris", "Rome", "Oslo"], "generate"),
        ([f"{i}" for i in range(50)] * 2, "generate"),
        (["a sentence that is rather too long to be a choice"] * 4, "generate"),
        (["two\nlines", "two\nlines", "x", "x"], "generate"),
    ],
)
def test_the_task_follows_from_the_answers(answers: list[str], task: str) -> None:
    assert detect_task(examples(*answers)) == task


def test_choices_are_found_or_given() -> None:
    assert find_choices(examples("no", "yes", "no")) == ("no", "yes")
    assert find_choices(examples("no", "yes"), ["yes", "no", "maybe"]) == ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "every answer in the data is 'A'"),
        (["A"], "at least two different"),
        (["A", "A"], "at least two different"),
        (["A", ""], "at least two different"),
        (["B", "C"], "f:0: the answer 'A' is not one of choices B,C"),
    ],
)
def test_choices_that_leave_nothing_to_choose(given: list[str] | None, message: str) -> None:
    with pytest.raises(IVONError, match=message):
        find_choices(examples("A", "A"), given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 99999, r":1: not JSON"),
        (b"9" * 5000, r":1: not JSON"),
        (b"\xff", r"given \S+x.jsonl: not UTF-8 text"),
        (b" \n", r"given \S+x.jsonl: the file is empty"),
        (None, r"given \S+x.jsonl: cannot be read \(there is no such file\)"),
    ],
)
def test_any_line_file_is_read_alike(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IVONError, match=message) as caught:
        list(read_lines(path, "given"))
    assert caught.value.parameter in ("given", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": [{"role": "assistant", "content": "A"}]}', "p.jsonl:1: no user turn"),
        ('{"messages": [{"role": "system", "content": "A"}]}', "p.jsonl:1: no user turn"),
        ('{"messages": []}', "p.jsonl:1: no user turn"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "p.jsonl:1: holds half a surrogate pair"),
        ("{", "p.jsonl:1: not JSON"),
        ("9" * 5000, "p.jsonl:1: not JSON"),
        ("[" * 99999, "p.jsonl:1: not JSON"),
        ("[1]", "p.jsonl:1: not a JSON object"),
        ('{"text": 1}', "p.jsonl:1: no list `messages`"),
        ("", "the file is empty"),
    ],
)
def test_a_wrong_prompts_file_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(IVONError) as error:
        read_chats(tmp_path / "p.jsonl")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_prompts_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(IVONError, match=r"prompts .*no.jsonl: cannot be read"):
        read_chats(tmp_path / "no.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(IVONError, match="not UTF-8"):
        read_chats(tmp_path / "b.jsonl")


def test_a_limit_takes_the_first_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, chat("A", "one?"), chat("B", "two?"))
    assert [prompt.source for prompt in read_chats(path, 1)] == [f"{path}:1"]
