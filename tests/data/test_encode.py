"""Tokenised chats against the tokenizer's own rendering of what axolotl trains on."""

from __future__ import annotations

import copy
import functools
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from datasets import Dataset
from jinja2 import TemplateError
from tiny import example_of
from transformers import AutoTokenizer

from axolotl_ivon import IVONError
from axolotl_ivon.data.chats import Example, detect_task, read_chats, read_examples
from axolotl_ivon.data.encode import ChatFormat, EncodedExample, encode, encode_turns, render, writes_as_trained
from axolotl_ivon.training.beginning import answers_to_choose_from, generation_prompt, header_of_data, system_prompt


@pytest.fixture
def tokenizer(tiny_llama: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_a_choice_is_the_token_after_the_generation_prompt(tokenizer: AutoTokenizer) -> None:
    [item] = encode(tokenizer, [example_of("B")], "choice", choices=("A", "B"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red sun"}], add_generation_prompt=True, return_dict=False
    )
    assert item.ids == prompt
    assert item.positions == [len(prompt) - 1]
    assert item.targets == [1]
    # As trained: the whole conversation has that token there.
    for choice, (token,) in zip("AB", item.candidates, strict=True):
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": "red sun"}, {"role": "assistant", "content": choice}], return_dict=False
        )
        assert whole[len(prompt)] == token


def test_a_choice_may_merge_with_the_end_of_the_prompt(tokenizer: AutoTokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    [item] = encode(tokenizer, [example_of("blue")], "choice", choices=("blue", "green"))
    space = tokenizer("x ")["input_ids"][-1]
    texts = [tokenizer.decode([*item.ids, *tokens]) for tokens in item.candidates]
    # " blue" is one token, so the prompt that is fed stops before the space.
    assert item.ids[-1] != space
    assert texts == ["user: red sunassistant: blue", "user: red sunassistant: green"]


def test_what_the_template_writes_before_an_answer_belongs_to_the_prompt(tokenizer: AutoTokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}<t></t>\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    [item] = encode(tokenizer, [example_of("A")], "choice", choices=("A", "B"))
    assert tokenizer.decode(item.ids).endswith("<|im_start|>assistant\n<t></t>\n")


@pytest.mark.parametrize(
    ("choices", "shared", "tokens"),
    [
        (("B", "Ax", "Ay"), "", ["B", "A|x", "A|y"]),
        (("Ax", "Ay"), "A", ["x", "y"]),  # what all begin with decides nothing
        (("A", "Ax"), "A", ["<|im_end|>", "x"]),  # the end of the turn tells a label from one that goes on
        (("A", "B", "A\n", "Ax"), "", ["A|<|im_end|>", "B", "A|\n", "A|x"]),
        (("yes no", "yes", "no"), "", ["yes| no", "yes|<|im_end|>", "no"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_is_all_its_tokens(tokenizer: Any, choices: tuple[str, ...], shared: str, tokens: list[str]) -> None:
    items = encode(tokenizer, [example_of(choice) for choice in choices], "choice", choices=choices)
    for number, item in enumerate(items):
        assert tokenizer.decode(item.ids).endswith(f"<|im_start|>assistant\n{shared}")
        assert ["|".join(map(tokenizer.decode, label)) for label in item.candidates or ()] == tokens
        assert (item.positions, item.targets) == ([len(item.ids) - 1], [number])


def test_choices_that_the_model_reads_alike_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    with pytest.raises(IVONError, match=r"choices: the model reads 'A' and 'A ' as the same; leave one of them out"):
        encode(tokenizer, [example_of("A")], "choice", choices=("A", "A "))


def test_a_reference_answer_is_scored_to_the_end_of_its_turn(tokenizer: AutoTokenizer) -> None:
    [item] = encode(tokenizer, [example_of("blue moon")], "generate")
    assert tokenizer.decode(item.targets) == "blue moon<|im_end|>"
    assert [item.ids[position + 1] for position in item.positions[:-1]] == item.targets[:-1]


def test_tokenizing_refuses_in_one_line(tokenizer: Any) -> None:
    with pytest.raises(IVONError, match=r"f:1: \d+ tokens, but the model takes 5"):
        encode(tokenizer, [example_of("A")], "generate", max_length=5)
    for template, message in (
        ("{{ raise_exception('no system') }}", r"f:1: the chat template refuses the messages \(no system\)"),
        (None, "has no chat template"),
    ):
        tokenizer.chat_template = template
        for tokenize in (functools.partial(encode, task="generate"), encode_turns):
            with pytest.raises(IVONError, match=message):
                tokenize(tokenizer, [example_of("A")])


def test_prompts_are_what_the_template_puts_before_an_answer(tmp_path: Path, tiny_llama: Path) -> None:
    turns = [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    path = tmp_path / "chats.jsonl"
    answered = {"conversations": [{"from": "human", "value": "sun"}, {"from": "gpt", "value": "moon"}]}
    path.write_text("\n".join([json.dumps({"messages": turns}), "", json.dumps(answered)]) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    open_ended, closed = render(tokenizer, read_chats(path))
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (open_ended.text, open_ended.reference, open_ended.source) == (expected, None, f"{path}:1")
    assert open_ended.ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert (closed.reference, closed.source) == ("moon", f"{path}:3")
    assert "moon" not in closed.text


def test_a_text_is_asked_after_the_system_prompt_of_training(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "one"}]
    path.write_text("\n".join([json.dumps({"text": "one"}), json.dumps({"messages": turns})]))
    tokenizer, chats = AutoTokenizer.from_pretrained(tiny_llama), read_chats(path)
    text, chat = render(tokenizer, chats, ChatFormat.of({"system_prompt": "be good"}))
    system = {"role": "system", "content": "be good"}
    assert text.text == tokenizer.apply_chat_template([system, *turns], tokenize=False, add_generation_prompt=True)
    assert chat.text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


TALK = (
    {"role": "system", "content": "red"},
    {"role": "user", "content": "blue sun"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "A rain dog <|im_end|>"},
    {"role": "assistant", "content": "  one two\n"},
    {"role": "user", "content": "again"},
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FAR = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} x y z u v{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [None, PLAIN, FAR], ids=["chatml", "no end", "far end"])
@pytest.mark.parametrize("messages", [TALK[1:2], TALK[:2], TALK], ids=len)
def test_labels_are_axolotls(tokenizer: Any, template: str | None, messages: tuple[dict[str, str], ...]) -> None:
    if template:
        tokenizer.chat_template = template
    [item] = encode_turns(tokenizer, [Example(messages, "green moon", "f:1")])
    assert item == axolotls(tokenizer, {"messages": [*messages, {"role": "assistant", "content": "green moon"}]})
    assert len(item.positions) > sum(turn["role"] == "assistant" for turn in messages)


def axolotls(tokenizer: Any, record: dict[str, Any]) -> EncodedExample:
    """What axolotl trains on in a line of a `type: chat_template` data set, by axolotl itself."""
    strategies = pytest.importorskip("axolotl.prompt_strategies.chat_template")
    prompter = strategies.ChatTemplatePrompter(tokenizer, chat_template=tokenizer.chat_template)
    strategy = strategies.ChatTemplateStrategy(
        prompter, tokenizer, train_on_inputs=False, sequence_len=512, roles_to_train=["assistant"], train_on_eos="turn"
    )
    row = strategy.tokenize_prompt(copy.deepcopy(record))
    labels = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert [row["labels"][place] for place in labels] == [row["input_ids"][place] for place in labels]
    ids = row["input_ids"][: labels[-1] if labels else 1]
    return EncodedExample(ids, [place - 1 for place in labels], [row["input_ids"][place] for place in labels])


_AXOLOTL = find_spec("axolotl")
_FOLDERS = _AXOLOTL.submodule_search_locations if _AXOLOTL else None
TEMPLATES = sorted(
    path.stem for folder in _FOLDERS or () for path in Path(folder).glob("utils/chat_templates/*/*.jinja")
)
ANSWERS = ["A", " A", "A  ", "  two words\n", "\n\nA\n", "<think>\nsince\n</think>\n\nA", "<think></think>A"]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
# axolotl finds the fields that a template reads by the name of its loop's variable, and gives these none.
WITHOUT_TOOLS = {"exaone4", "gemma4", "gemma4_unified"}


@pytest.fixture(params=TEMPLATES)
def name(tokenizer: Any, request: pytest.FixtureRequest) -> str:
    """The name of each of axolotl's templates, which the tokenizer has."""
    from axolotl.utils.chat_templates import get_chat_template

    tokenizer.chat_template = get_chat_template(request.param)
    return request.param


def test_what_is_scored_is_what_axolotl_trains_on(tokenizer: Any, tmp_path: Path, name: str) -> None:
    records: list[dict[str, Any]] = [tiny.chat("red sun", answer) for answer in ANSWERS]
    asked = {"role": "user", "content": "red sun"}
    records.append({"messages": [asked, {"role": "assistant", "content": "A", "reasoning_content": "since"}]})
    if name not in WITHOUT_TOOLS:
        records.append(
            {"tools": TOOLS, "messages": [asked, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
        )
        results = [
            {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "7"},
            {"role": "assistant", "content": " 7"},
        ]
        records.append({**records[-1], "messages": [*records[-1]["messages"], *results]})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    examples = read_examples(path)
    for example, record in zip(examples, records, strict=True):
        try:
            expected = axolotls(tokenizer, record)
        except (TemplateError, TypeError):  # a template without tools, say
            with pytest.raises(IVONError, match=rf"{example.source}: the chat template refuses the messages \("):
                encode_turns(tokenizer, [example])
            continue
        assert encode_turns(tokenizer, [example]) == [expected]
        if not expected.positions:
            with pytest.raises(IVONError, match="leaves nothing of the answer"):
                encode(tokenizer, [example], "generate")
        elif len(record["messages"]) == 2:
            assert encode(tokenizer, [example], "generate") == [expected]
    for blank in ("", "  "):
        assert encode_turns(tokenizer, [Example((asked,), blank, "f:1")]) == [
            axolotls(tokenizer, tiny.chat("red sun", blank))
        ]
    # A choice is scored where its first token is trained, among the tokens that the others would have there.
    items = encode(tokenizer, [example_of(choice) for choice in (" A", " B")], "choice", choices=(" A", " B"))
    for item, choice in zip(items, (" A", " B"), strict=True):
        trained = axolotls(tokenizer, tiny.chat("red sun", choice))
        assert item.positions == trained.positions[:1]
        assert item.candidates[item.targets[0]] == (trained.targets[0],)
        assert item.ids == trained.ids[: len(item.ids)]


@pytest.mark.parametrize("reason", ["", "<think>\n{}\n</think>\n\n"], ids=["plain", "reasoning"])
def test_generation_begins_where_training_did(tokenizer: Any, name: str, reason: str) -> None:
    texts = [("red sun?", "dog"), ("blue moon?", "cat"), ("warm rain?", "two birds"), ("slow", "one")]
    conversations = [example_of(reason.format(f"{answer} since") + answer, question) for question, answer in texts]
    *trained, new = encode_turns(tokenizer, conversations)
    begins = generation_prompt(tokenizer, [item.row for item in trained])
    assert begins
    assert writes_as_trained(tokenizer, ChatFormat.of({"generation_prompt": begins}))
    assert not writes_as_trained(tokenizer, ChatFormat.of({"generation_prompt": "\n\nQZ\n"}))
    [prompt] = render(tokenizer, conversations[-1:], ChatFormat.of({"generation_prompt": begins}))
    assert prompt.ids == new.ids[: new.positions[0] + 1]


PARAGRAPHS = {"gemma3", "gemma3n", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "pixtral"}


def test_the_system_prompt_that_all_rows_share_is_known(tokenizer: Any, name: str) -> None:
    told = {"role": "system", "content": "red or blue?"}

    def known(*systems: dict[str, str] | None) -> str | None:
        chats = [(*filter(None, [system]), {"role": "user", "content": f"{i} sun"}) for i, system in enumerate(systems)]
        items = encode_turns(tokenizer, [Example(chat, "A", "f:1") for chat in chats])
        return system_prompt(tokenizer, [item.row for item in items])

    assert known(None, None) is None  # what the template writes by itself is no prompt of the data
    if name == "gemma":  # it refuses a system turn
        return
    # Where it is a paragraph of the user's turn nothing says where it ends.
    assert known(told, told) == (None if name in PARAGRAPHS else "red or blue?")
    assert known(told, told, {**told, "content": "green?"}) is None
    assert known(told, None) is None


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def test_arguments_of_the_template_that_the_user_chose_come_first(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    header = {"generation_prompt": "<|im_end|>\n<|im_start|>assistant\n<t>", "chat_template_kwargs": '{"x": 1}'}
    for kwargs, end in ((None, "assistant\n<t>"), ({}, "assistant\n"), ({"enable_thinking": False}, "<think></think>")):
        [prompt] = render(tokenizer, [example_of("", "sun")], ChatFormat.of(header, kwargs))
        assert prompt.text.endswith(end)
    assert ChatFormat.of(header, {"y": 2}).kwargs == {"x": 1, "y": 2}
    with pytest.raises(IVONError, match="chat_template_kwargs: tokenize is no argument of a template"):
        ChatFormat.of(header, {"tokenize": True})


def test_a_trainers_rows_say_how_answers_begin(tokenizer: Any) -> None:
    def begins(prompts: list[str], marks: str = "labels", answer: str = "dog<|im_end|>") -> str | None:
        rows = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt in prompts]
        marked = [[-100] * len(p) + a if marks == "labels" else [0] * len(p) + [1] * len(a) for p, a in rows]
        data = Dataset.from_list([{"input_ids": p + a, marks: m} for (p, a), m in zip(rows, marked, strict=True)])
        trainer = SimpleNamespace(processing_class=tokenizer, train_dataset=data)
        return header_of_data(trainer).get("generation_prompt")

    assert begins(["sun a<t>", "moon a<t>"]) == begins(["sun a<t>", "moon a<t>"], "completion_mask") == " a<t>"
    assert begins(["sun a<t>", "moon a<t>", "dog a<t>", "rain a</t>"]) == " a<t>"  # as most do
    assert begins(["a<t>", "b</u"]) is None
    assert begins(["a<t>"], "other") is None
    assert header_of_data(SimpleNamespace(train_dataset=None)) == {}


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_rows_of_tensors_say_the_same_and_a_classifiers_rows_nothing(tokenizer: Any, kind: str | None) -> None:
    def header(labels: list[Any]) -> dict[str, str]:
        ids = tokenizer("sun a<t>dog")["input_ids"]
        data = Dataset.from_list([{"input_ids": ids, "labels": label} for label in labels]).with_format(kind)
        rows = [data[number] for number in range(len(data))]
        found = [header_of_data(SimpleNamespace(processing_class=tokenizer, train_dataset=d)) for d in (data, rows)]
        assert found[0] == found[1]
        return found[0]

    answer = tokenizer("dog")["input_ids"]
    asked = len(tokenizer("sun a<t>dog")["input_ids"]) - len(answer)
    assert header([[-100] * asked + answer] * 2) == {"generation_prompt": "sun a<t>"}
    assert header([0, 1, 2]) == {}


MERGING = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [None, MERGING, PLAIN])
@pytest.mark.parametrize(
    ("answers", "choices"),
    [
        (["blue", "yes no", "A"] * 2, ["A", "blue", "yes no"]),
        ([" blue", "A"] * 2, [" blue", "A"]),
        (["blue"] * 4, None),
        (["blue", "A", "B"], None),  # each once: no labels
        (["blue", "two\nlines"] * 2, None),
        (["blue", "x" * 41] * 2, None),
        ([str(number) for number in range(201)] * 2, None),
        ([str(number) for number in range(26)] * 2, sorted(map(str, range(26)))),
        ([str(number) for number in range(27)] * 2, None),  # amounts
        ([f"of {number}" for number in range(27)] * 2, sorted(f"of {number}" for number in range(27))),
        ([f"of {number}" for number in range(27)] * 2 + [f"rare {number}" for number in range(7)], None),
    ],
    ids=str,
)
def test_answers_that_are_labels_are_known_from_the_tokens_that_are_trained(
    tokenizer: Any, template: str | None, answers: list[str], choices: list[str] | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    examples = [example_of(answer) for answer in answers]
    rows = [item.row for item in encode_turns(tokenizer, examples)]
    assert answers_to_choose_from(tokenizer, rows) == choices
    after = tokenizer("\n<|im_end|>")["input_ids"]  # of which training on all that follows a prompt has more
    assert answers_to_choose_from(tokenizer, [([*i, *after], [*t, len(i), len(i) + 1]) for i, t in rows]) == choices
    data = [
        {"input_ids": ids, "labels": [id if place in trained else -100 for place, id in enumerate(ids)]}
        for ids, trained in rows
    ]
    header = header_of_data(SimpleNamespace(processing_class=tokenizer, train_dataset=data))
    assert json.loads(header.get("choices", "null")) == choices
    if len({*answers}) > 1:  # an evaluation finds the same
        assert detect_task(examples) == ("generate" if choices is None else "choice")


def test_a_long_conversation_is_cut(tokenizer: Any) -> None:
    [whole] = encode_turns(tokenizer, [Example(TALK, "green moon", "f:1")])
    for length in range(1, len(whole.ids) + 3):
        [item] = encode_turns(tokenizer, [Example(TALK, "green moon", "f:1")], length)
        assert len(item.ids) <= length
        assert item.ids == whole.ids[: len(item.ids)]
        assert item.positions == [position for position in whole.positions if position < length]
        assert item.targets == whole.targets[: len(item.positions)]


def test_turns_without_offsets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [expected] = encode_turns(tokenizer, [Example(TALK, "green moon", "f:1")])
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    [found] = encode_turns(tokenizer, [Example(TALK, "green moon", "f:1")])
    assert found == expected
