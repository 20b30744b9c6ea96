"""Chats as a model reads them: token ids, and the positions and classes that are scored."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import IVONError, one_line, param_ref
from .chats import Example, Message

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

    @property
    def row(self) -> tuple[list[int], list[int]]:
        """All tokens of a trained conversation, and the places of those that are trained."""
        return [*self.ids, *self.targets[-1:]], [position + 1 for position in self.positions]


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

    def after_system(self, example: Example) -> Example:
        """Return an example with the system prompt of training before a text that is no chat."""
        if not self.system_prompt or not example.plain or example.messages[0]["role"] == "system":
            return example
        return replace(example, messages=({"role": "system", "content": self.system_prompt}, *example.messages))


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
    template = _Template(tokenizer, chat_format)
    encode_choice = _ChoiceEncoder(template, choices) if task == "choice" else None
    items = []
    for example in examples:
        item = encode_choice(example) if encode_choice else _encode_turns(template, example, [len(example.messages)])
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
    template = _Template(tokenizer, chat_format)
    items = []
    for example in examples:
        trained = [number for number, turn in enumerate(example.turns) if turn["role"] == "assistant"]
        items.append(_encode_turns(template, example, trained, max_length))
    return items


def _encode_turns(
    template: _Template, example: Example, numbers: Sequence[int], max_length: int | None = None
) -> EncodedExample:
    """Tokenise a conversation; what is scored are the turns with these numbers."""
    text, end_token = template.text(example.turns, example), template.tokenizer.eos_token_id
    encoded = template.encode([text])
    ids, labels = encoded["input_ids"][0], set[int]()
    for number in numbers:
        first, last = template.span(encoded, 0, text, template.texts_without(example, number))
        if first >= last:
            continue
        labels.update(range(first, last))
        near = ids[last : last + 4]  # three tokens on
        if end_token in near:
            labels.add(last + near.index(end_token))
    whole = len(ids) if max_length is None else max_length + 1
    positions = [label - 1 for label in sorted(labels) if 0 < label < whole]
    targets = [ids[position + 1] for position in positions]
    return EncodedExample(ids[: positions[-1] + 1] if positions else ids[:1], positions, targets)


_SENTINELS = ("[[turn]]", "zzturnzz")  # contents that share no first and no last character with one another


class _Template:
    """The chat template of a tokenizer, and how training used it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
        if not tokenizer.chat_template:
            raise IVONError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template; save the tokenizer that axolotl trained "
                "with beside the adapter"
            )
        self.tokenizer, self.format = tokenizer, chat_format

    def text(self, turns: Sequence[Message], example: Example, **options: Any) -> str:
        """Return what the template makes of `turns`, which are of `example`, as its tools are."""
        from jinja2 import TemplateError

        try:
            options = {"tools": example.tools, "tokenize": False, **options, **self.format.kwargs}
            return str(self.tokenizer.apply_chat_template(list(turns), **options))  # type: ignore[arg-type]
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:  # it may do anything
            raise IVONError(f"{example.source}: the chat template refuses the messages ({one_line(error)})") from None

    def texts_without(self, example: Example, number: int) -> list[str]:
        """Return the conversation with each sentinel in place of all that one turn says."""
        turns = example.turns
        changed = ({"role": turns[number]["role"], "content": content} for content in _SENTINELS)
        return [self.text([*turns[:number], turn, *turns[number + 1 :]], example) for turn in changed]

    def encode(self, texts: list[str]) -> Any:
        """Return the tokenizer's encoding of texts, in which the template has written the special tokens."""
        return self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def span(self, encoded: Any, row: int, text: str, others: Sequence[str]) -> tuple[int, int]:
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
        if self.tokenizer.is_fast:
            starts, ends = zip(*encoded["offset_mapping"][row], strict=True)
            return bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        ids = encoded["input_ids"][row]
        return common_length([ids, self.ids(text[:start])]), common_length([ids, self.ids(text[:end])])


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

    def __init__(self, template: _Template, choices: Sequence[str]) -> None:
        self._template, self._choices = template, choices
        self._candidates: tuple[tuple[int, ...], ...] = ()
        # Of the conversation with the first choice: the last tokens, and how many of them follow the prompt.
        self._ending, self._length = [-1], 0

    def __call__(self, example: Example) -> EncodedExample:
        if example.says_more:
            raise IVONError(
                f"{example.source}: the answer is no choice alone (it has {', '.join(example.more)}); use "
                f"{param_ref('task')} generate"
            )
        ids = self._template.ids(self._text(example, self._choices[0]))
        # Where a conversation ends as the one before, the choices have the same tokens: no need to render them all.
        if ids[-len(self._ending) :] != self._ending:
            self._encode_all(example)
        start = len(ids) - self._length
        return EncodedExample(ids[:start], [start - 1], [self._choices.index(example.answer)], self._candidates)

    def _text(self, example: Example, choice: str) -> str:
        turns, number = example.turns, len(example.messages)
        turns[number] = {**turns[number], "content": choice}
        return self._template.text(turns, example)

    def _encode_all(self, example: Example) -> None:
        template, choices = self._template, self._choices
        others = template.texts_without(example, len(example.messages))
        texts = [self._text(example, choice) for choice in choices]
        encoded = template.encode(texts)
        rows, ends = encoded["input_ids"], []
        for number, (choice, text) in enumerate(zip(choices, texts, strict=True)):
            begin, end = template.span(encoded, number, text, others)
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
            after = itertools.chain(ids[end:], itertools.repeat(template.tokenizer.eos_token_id or 0))
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
        template = _Template(tokenizer, chat_format)
        ids = template.ids(template.text(example.messages, example))[:max_length]
    else:
        text = "\n".join(message.get("content", "") for message in example.messages)
        ids = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    if not ids:
        raise IVONError(f"{example.source}: the text has no tokens; fill it in or remove the line")
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


def render(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example], chat_format: ChatFormat = _AS_IS
) -> list[Prompt]:
    """Put chats through the chat template: what training wrote before an answer is the prompt.

    Where the header of σ does not say what that was, it is what the template writes before an answer without reasoning.
    With template arguments that the user chose, it is the template's own generation prompt.
    """
    template = _Template(tokenizer, chat_format)
    prompts = []
    for chat in map(chat_format.after_system, chats):
        ids = _chosen_prompt(template, chat) or _trained_prompt(template, chat)
        if not ids:
            raise IVONError(f"{chat.source}: the chat template makes nothing of it; use the template of training")
        prompts.append(Prompt(template.decode(ids), ids, chat.answer or None, chat.source))
    return prompts


def _chosen_prompt(template: _Template, chat: Example) -> list[int] | None:
    """Return the prompt with the template's own generation prompt, if the user chose that and it has one."""
    if not template.format.chosen:
        return None
    bare, begun = (template.text(chat.messages, chat, add_generation_prompt=begin) for begin in (False, True))
    return None if begun == bare else template.ids(begun)


def _overlap(text: str, trained: str) -> int:
    """Return how much of the end of `text` is in `trained`; 0 if that is nothing but blanks."""
    length = next((n for n in range(min(len(text), len(trained)), 0, -1) if text[-n:] in trained), 0)
    return length if length and text[-length:].strip() else 0


def writes_as_trained(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> bool:
    """Say whether the template begins an answer as training did, as far as the header and a short question tell."""
    if not chat_format.generation_prompt or chat_format.chosen or not tokenizer.chat_template:
        return True
    template = _Template(tokenizer, chat_format)
    chat = chat_format.after_system(Example(({"role": "user", "content": "0"},), "", "a question", plain=True))
    try:
        return _matched(template, chat, chat_format.generation_prompt)[1] > 0
    except IVONError:  # a template that wants more than a question
        return True


def _shared(template: _Template, chat: Example, answers: Iterable[Mapping[str, str]]) -> list[int]:
    """Return what the conversation begins with, whichever of the answers follows."""
    rows = []
    for answer in answers:
        try:
            rows.append(template.ids(template.text([*chat.messages, {"role": "assistant", **answer}], chat)))
        except IVONError:
            if answer in _ANSWERS:
                raise
    return rows[0][: common_length(rows)]


def _matched(template: _Template, chat: Example, trained: str) -> tuple[list[int], int]:
    """Return what comes before an answer, and how much of its end is in what training wrote there."""
    ids = _shared(template, chat, [*_ANSWERS, *_REASONED])
    # The last token, a blank say, may have merged with the answers of training.
    lengths = (len(ids) - 1, len(ids))
    length, kept = max((_overlap(template.decode(ids[:kept]), trained), kept) for kept in lengths)
    return ids[:kept], length


def _trained_prompt(template: _Template, chat: Example) -> list[int]:
    if trained := template.format.generation_prompt:
        ids, length = _matched(template, chat, trained)
        if length:  # else the template is not that of training
            end = template.decode(ids)[-length:]
            rest = trained[trained.rindex(end) + length :]
            return ids + (template.ids(rest) if rest else [])
    return _shared(template, chat, _ANSWERS)
