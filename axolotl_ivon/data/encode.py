"""Chats as a model reads them: token ids, and the positions and classes that are scored."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import IVONError, one_line, param_ref
from .chats import Chat, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedExample:
    """One tokenised example: at `positions` of `ids` the next-token (or label) distribution is scored.

    `targets` holds a class for each position: the index of the choice, the label, or the next token's id.
    `candidates` are the tokens of each choice after `ids`, or None if the classes are all tokens, or labels. With
    `by_length` they are scored by the mean over their tokens.
    """

    ids: list[int]
    positions: list[int]
    targets: list[int]
    candidates: tuple[tuple[int, ...], ...] | None = None
    by_length: bool = False


# What `apply_chat_template` takes for itself.
# fmt: off
_NOT_THE_TEMPLATES = {
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
# fmt: on


@dataclass(frozen=True)
class ChatFormat:
    """How a model reads chats, beyond the template of its tokenizer.

    Attributes:
        kwargs: arguments of the template (`enable_thinking`, say).
        generation_prompt: what training wrote last before the turns that it trained, as the header of σ has it.
        chosen: whether the user chose `kwargs`: an answer then begins with the template's own generation prompt.
        system_prompt: what the system turn of all training data said, as the header has it; empty if there is none.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    generation_prompt: str | None = None
    chosen: bool = False
    system_prompt: str = ""

    @classmethod
    def of(cls, header: Mapping[str, str], kwargs: Mapping[str, Any] | None = None) -> ChatFormat:
        """Return the format that training has put into the header of σ; the user's `kwargs` are added to its own.

        Raises:
            IVONError: one of `kwargs` would not reach the template.
        """
        if wrong := [name for name in kwargs or () if name in _NOT_THE_TEMPLATES]:
            raise IVONError(f"{param_ref('chat_template_kwargs')}: {wrong[0]} is no argument of a template; remove it")
        trained: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            trained = dict(json.loads(header.get("chat_template_kwargs") or "{}"))
        chosen, begins, system = kwargs is not None, header.get("generation_prompt"), header.get("system_prompt", "")
        return cls({**trained, **(kwargs or {})}, begins, chosen, system)


_AS_IS = ChatFormat()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: str,
    *,
    choices: Sequence[str] = (),
    label2id: Mapping[str, int] | None = None,
    max_length: int | None = None,
    chat_format: ChatFormat = _AS_IS,
) -> list[EncodedExample]:
    """Tokenise examples for a task ("choice" needs `choices`, "classify" `label2id`).

    Answers and choices are scored as the chat template writes them into the whole conversation, which is how they are
    trained: trimmed, say, or without their reasoning.

    Raises:
        IVONError: no chat template, or one that refuses a conversation or leaves nothing of an answer; two choices
            of the same tokens; an unknown label; an example longer than `max_length` tokens (classify truncates
            instead).
    """
    if task == "classify":
        return [_encode_label(tokenizer, example, label2id or {}, max_length, chat_format) for example in examples]
    _check_template(tokenizer)
    items = []
    encode_choice = _ChoiceEncoder(tokenizer, choices, chat_format) if task == "choice" else None
    for example in examples:
        if encode_choice:
            item = encode_choice(example)
        else:
            item = _encode_turns(tokenizer, example, [len(example.messages)], None, chat_format)
        if not item.positions:
            raise IVONError(
                f"{example.source}: the chat template leaves nothing of the answer {example.answer[:40]!r}; reword or "
                "remove it"
            )
        longest = len(item.ids) + max((len(tokens) - 1 for tokens in item.candidates or ()), default=0)
        if max_length is not None and longest > max_length:
            raise IVONError(
                f"{example.source}: {longest} tokens, but the model takes {max_length}; shorten or remove it"
            )
        items.append(item)
    return items


_SENTINELS = ("[[turn]]", "zzturnzz")  # contents that share no first and no last character with one another


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int | None = None,
    chat_format: ChatFormat = _AS_IS,
) -> list[EncodedExample]:
    """Tokenise whole conversations; what is scored is what axolotl trains on by default, all assistant turns.

    Of a turn that is what the chat template makes of it, tool calls and reasoning included, and the end-of-sequence
    token that follows within three tokens (`type: chat_template` with `roles_to_train: [assistant]` and
    `train_on_eos: turn`). Of a longer conversation the first `max_length` tokens are taken, so an item may have no
    positions.
    """
    _check_template(tokenizer)
    items = []
    for example in examples:
        trained = [number for number, turn in enumerate(example.turns) if turn["role"] == "assistant"]
        items.append(_encode_turns(tokenizer, example, trained, max_length, chat_format))
    return items


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    numbers: Sequence[int],
    max_length: int | None,
    chat_format: ChatFormat,
) -> EncodedExample:
    """Tokenise a conversation; what is scored are the turns with these numbers."""
    turns = example.turns
    text = _chat_text(tokenizer, turns, example, chat_format)
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids, labels = encoded["input_ids"][0], set[int]()
    for number in numbers:
        others = _sentinel_texts(tokenizer, turns, number, example, chat_format)
        first, last = _token_span(tokenizer, encoded, 0, text, others)
        if first >= last:
            continue
        labels.update(range(first, last))
        near = ids[last : last + 4]  # three tokens on
        if tokenizer.eos_token_id in near:
            labels.add(last + near.index(tokenizer.eos_token_id))
    whole = len(ids) if max_length is None else max_length + 1
    positions = [label - 1 for label in sorted(labels) if 0 < label < whole]
    targets = [ids[position + 1] for position in positions]
    return EncodedExample(ids[: positions[-1] + 1] if positions else ids[:1], positions, targets)


def _sentinel_texts(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    number: int,
    example: Example,
    chat_format: ChatFormat,
) -> list[str]:
    """Return the conversation with each sentinel in place of all that one turn says."""
    changed = ({"role": turns[number]["role"], "content": content} for content in _SENTINELS)
    return [
        _chat_text(tokenizer, [*turns[:number], turn, *turns[number + 1 :]], example, chat_format) for turn in changed
    ]


def _token_span(
    tokenizer: PreTrainedTokenizerBase, encoded: Any, row: int, text: str, others: Sequence[str]
) -> tuple[int, int]:
    """Return the first token, and the one after the last, of what differs between `text` and all of `others`.

    `text` was tokenised as `encoded["input_ids"][row]`; an empty span is (0, 0).
    """
    spans = []
    for other in others:
        start = common_length([text, other])
        rest = min(len(text), len(other)) - start
        spans.append((start, len(text) - common_length([text[::-1][:rest], other[::-1][:rest]])))
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    if start >= end:
        return 0, 0
    if tokenizer.is_fast:
        starts, ends = zip(*encoded["offset_mapping"][row], strict=True)
        return bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
    ids = encoded["input_ids"][row]
    first, last = (common_length([ids, part]) for part in _tokens(tokenizer, [text[:start], text[:end]]))
    return first, last


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise IVONError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; save the tokenizer that axolotl trained "
            "with beside the adapter"
        )


def _chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    of: Example | Chat,
    chat_format: ChatFormat,
    **options: Any,
) -> str:
    """Return what the chat template makes of messages, with the tools of the example or prompt that they are `of`."""
    from jinja2 import TemplateError

    try:
        options = {"tools": of.tools, "tokenize": False, **options, **chat_format.kwargs}
        return str(tokenizer.apply_chat_template(list(messages), **options))  # type: ignore[arg-type]
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:  # the template may do anything
        raise IVONError(f"{of.source}: the chat template refuses the messages ({one_line(error)})") from None


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes the special tokens itself


def common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Return how many leading elements all sequences share."""
    first, *others = sequences
    least, most = 0, min(map(len, sequences))
    while least < most:  # comparing slices is far faster than comparing elements
        middle = (least + most + 1) // 2
        if all(other[least:middle] == first[least:middle] for other in others):
            least = middle
        else:
            most = middle - 1
    return least


_CONTEXT = 16  # tokens before an answer on which those of the answer may depend


class _ChoiceEncoder:
    """Tokenises examples whose answer is one of `choices`, each as the template writes it into the conversation.

    The tokens of a choice are those of its text. Where another choice goes on from there, the next token, which ends
    the turn, counts as well: the answer is then that choice alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, choices: Sequence[str], chat_format: ChatFormat) -> None:
        self._tokenizer, self._choices, self._format = tokenizer, choices, chat_format
        self._candidates: tuple[tuple[int, ...], ...] = ()
        # Of the conversation with the first choice: the last tokens, and how many of them follow the prompt.
        self._ending, self._length = [-1], 0

    def __call__(self, example: Example) -> EncodedExample:
        if example.says_more:
            raise IVONError(
                f"{example.source}: the answer is no choice alone (it has {', '.join(example.more)}); use "
                f"{param_ref('task')} generate"
            )
        [ids] = _tokens(self._tokenizer, [self._text(example, self._choices[0])])
        # Where a conversation ends as the one before, the choices have the same tokens: no need to render them all.
        if ids[-len(self._ending) :] != self._ending:
            self._encode_all(example)
        start = len(ids) - self._length
        return EncodedExample(ids[:start], [start - 1], [self._choices.index(example.answer)], self._candidates)

    def _text(self, example: Example, choice: str) -> str:
        turns, number = example.turns, len(example.messages)
        turns[number] = {**turns[number], "content": choice}
        return _chat_text(self._tokenizer, turns, example, self._format)

    def _encode_all(self, example: Example) -> None:
        tokenizer, choices = self._tokenizer, self._choices
        others = _sentinel_texts(tokenizer, example.turns, len(example.messages), example, self._format)
        texts = [self._text(example, choice) for choice in choices]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        rows, ends = encoded["input_ids"], []
        for number, (choice, text) in enumerate(zip(choices, texts, strict=True)):
            begin, end = _token_span(tokenizer, encoded, number, text, others)
            if begin >= end:
                raise IVONError(
                    f"{param_ref('choices')}: the chat template leaves nothing of {choice!r}; reword it, or use "
                    f"{param_ref('task')} generate"
                )
            ends.append(end)
        labels = [tuple(ids[:end]) for ids, end in zip(rows, ends, strict=True)]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                same = choices[labels.index(label)]
                raise IVONError(
                    f"{param_ref('choices')}: the model reads {same!r} and {choices[number]!r} as the same; leave one "
                    "of them out"
                )
        begun = {label[:length] for label in labels for length in range(1, len(label))}
        for number, (ids, end) in enumerate(zip(rows, ends, strict=True)):
            after = itertools.chain(ids[end:], itertools.repeat(tokenizer.eos_token_id or 0))
            while labels[number] in begun:
                labels[number] += (next(after),)
        # What all choices begin with decides nothing, and belongs to the prompt.
        start, first = common_length(labels), rows[0]
        self._candidates, self._length = tuple(label[start:] for label in labels), len(first) - start
        self._ending = [-1] if example.after else first[max(0, start - _CONTEXT) :]


def _encode_label(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    label2id: Mapping[str, int],
    max_length: int | None,
    chat_format: ChatFormat,
) -> EncodedExample:
    label = label2id.get(example.answer)
    if label is None and example.answer.isdecimal() and int(example.answer) < len(label2id):
        label = int(example.answer)
    if label is None:
        raise IVONError(
            f"{example.source}: the label {example.answer!r} is neither one of the model's "
            f"({', '.join(label2id)}) nor an index below {len(label2id)}"
        )
    if tokenizer.chat_template and not example.plain:
        text = _chat_text(tokenizer, example.messages, example, chat_format)
        ids = _tokens(tokenizer, [text])[0][:max_length]
    else:
        text = "\n".join(message.get("content", "") for message in example.messages)
        ids = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    return EncodedExample(ids, [len(ids) - 1], [label])


class Prompt(NamedTuple):
    """A chat as the model reads it: text and token ids after the chat template."""

    text: str
    ids: list[int]
    reference: str | None
    source: str


# Answers that have no first token in common; then, for models that reason, such as have reasoning before them.
_ANSWERS = ({"content": "0"}, {"content": "1"})
_REASONED = ({"content": "<think>\n0\n</think>\n\n1"}, {"reasoning_content": "0", "thinking": "0", "content": "1"})


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], chat_format: ChatFormat = _AS_IS) -> list[Prompt]:
    """Put chats through the chat template: what training wrote before an answer is the prompt.

    Where the header of σ does not say what that was, it is what the template writes before an answer without reasoning.
    With template arguments that the user chose, it is the template's own generation prompt.
    """
    _check_template(tokenizer)
    prompts = []
    for chat in chats:
        ids = _chosen_prompt(tokenizer, chat, chat_format) or _trained_prompt(tokenizer, chat, chat_format)
        if not ids:
            raise IVONError(f"{chat.source}: the chat template makes nothing of it; use the template of training")
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        prompts.append(Prompt(text, ids, chat.reference, chat.source))
    return prompts


def _chosen_prompt(tokenizer: PreTrainedTokenizerBase, chat: Chat, chat_format: ChatFormat) -> list[int] | None:
    """Return the prompt with the template's own generation prompt, if the user chose that and it has one."""
    if not chat_format.chosen:
        return None
    bare, begun = (
        _chat_text(tokenizer, chat.messages, chat, chat_format, add_generation_prompt=begin) for begin in (False, True)
    )
    return None if begun == bare else _tokens(tokenizer, [begun])[0]


def _overlap(text: str, trained: str) -> int:
    """Return how much of the end of `text` is in `trained`; 0 if that is nothing but blanks."""
    length = next((n for n in range(min(len(text), len(trained)), 0, -1) if text[-n:] in trained), 0)
    return length if length and text[-length:].strip() else 0


def _trained_prompt(tokenizer: PreTrainedTokenizerBase, chat: Chat, chat_format: ChatFormat) -> list[int]:
    def shared(answers: Iterable[Mapping[str, str]]) -> list[int]:
        texts = []
        for answer in answers:
            try:
                turns = [*chat.messages, {"role": "assistant", **answer}]
                texts.append(_chat_text(tokenizer, turns, chat, chat_format))
            except IVONError:
                if answer in _ANSWERS:
                    raise
        tokens = _tokens(tokenizer, texts)
        return tokens[0][: common_length(tokens)]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    if trained := chat_format.generation_prompt:
        ids = shared([*_ANSWERS, *_REASONED])
        # The last token, a blank say, may have merged with the answers of training.
        length, kept = max((_overlap(decode(ids[:kept]), trained), kept) for kept in (len(ids) - 1, len(ids)))
        if length:  # else the template is not that of training
            end = decode(ids[:kept])[-length:]
            rest = trained[trained.rindex(end) + length :]
            return ids[:kept] + (_tokens(tokenizer, [rest])[0] if rest else [])
    return shared(_ANSWERS)
