"""Chats as a model reads them: token ids, and the positions and classes that are scored."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import IVONError, param_ref
from .chats import Chat, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedExample:
    """One tokenised example: at `positions` of `ids` the next-token (or label) distribution is scored.

    `targets` holds a class for each position: the index of the choice, the label, or the next token's id.
    `candidates` are the token ids of the choices, or None if the classes are all tokens, or labels.
    """

    ids: list[int]
    positions: list[int]
    targets: list[int]
    candidates: tuple[int, ...] | None = None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: str,
    *,
    choices: Sequence[str] = (),
    label2id: Mapping[str, int] | None = None,
    max_length: int | None = None,
) -> list[EncodedExample]:
    """Tokenise examples for a task ("choice" needs `choices`, "classify" `label2id`).

    Raises:
        IVONError: no chat template, or one that refuses a conversation; two choices that start with the same
            token; an unknown label; an example longer than `max_length` tokens (classify truncates instead).
    """
    if task == "classify":
        return [_encode_label(tokenizer, example, label2id or {}, max_length) for example in examples]
    _check_template(tokenizer)
    make = _encode_choice if task == "choice" else _encode_reference
    items = [make(tokenizer, example, choices) for example in examples]
    for item, example in zip(items, examples, strict=True):
        if max_length is not None and len(item.ids) > max_length:
            raise IVONError(
                f"{example.source}: {len(item.ids)} tokens, but the model takes {max_length}; shorten or remove it"
            )
    return items


_SENTINELS = ("[[turn]]", "zzturnzz")  # contents that share no first and no last character with one another


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int | None = None
) -> list[EncodedExample]:
    """Tokenise whole conversations; what is scored is what axolotl trains on by default, all assistant turns.

    Of a turn that is its content, and the end-of-sequence token that follows within three tokens
    (`type: chat_template` with `roles_to_train: [assistant]` and `train_on_eos: turn`). Of a longer conversation the
    first `max_length` tokens are taken, so an item may have no positions.
    """
    _check_template(tokenizer)
    return [_encode_turns(tokenizer, example, max_length) for example in examples]


def _encode_turns(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int | None) -> EncodedExample:
    turns = [*example.messages, {"role": "assistant", "content": example.answer}]
    text = _chat_text(tokenizer, turns, example.source)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids, labels = encoded["input_ids"], set[int]()
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        spans = []
        for content in _SENTINELS:
            changed = [*turns[:number], {**turn, "content": content}, *turns[number + 1 :]]
            other = _chat_text(tokenizer, changed, example.source)
            start = common_length([text, other])
            rest = min(len(text), len(other)) - start
            spans.append((start, len(text) - common_length([text[::-1][:rest], other[::-1][:rest]])))
        start, end = min(start for start, _ in spans), max(end for _, end in spans)
        if start >= end:
            continue
        if tokenizer.is_fast:
            starts, ends = zip(*encoded["offset_mapping"], strict=True)
            first, last = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        else:
            first, last = (common_length([ids, part]) for part in _tokens(tokenizer, [text[:start], text[:end]]))
        labels.update(range(first, last))
        near = ids[last : last + 4]  # three tokens on
        if tokenizer.eos_token_id in near:
            labels.add(last + near.index(tokenizer.eos_token_id))
    whole = len(ids) if max_length is None else max_length + 1
    positions = [label - 1 for label in sorted(labels) if 0 < label < whole]
    targets = [ids[position + 1] for position in positions]
    return EncodedExample(ids[: positions[-1] + 1] if positions else ids[:1], positions, targets)


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise IVONError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; save the tokenizer that axolotl trained "
            "with beside the adapter"
        )


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], source: str) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except TemplateError as error:
        raise IVONError(f"{source}: the chat template refuses the messages ({error})") from None


def _render(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, str]:
    """Return what the chat template puts before and after the answer.

    Two answers are rendered: what both share before they differ is written before any answer in training. For most
    templates it is what `add_generation_prompt` gives; others write more there (an empty `<think>` block, say).
    """
    zero, one = (
        _chat_text(tokenizer, [*example.messages, {"role": "assistant", "content": content}], example.source)
        for content in "01"
    )
    start = common_length([zero, one])
    return zero[:start], zero[start + 1 :]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes the special tokens itself


def common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Return how many leading elements all sequences share."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _encode_choice(tokenizer: PreTrainedTokenizerBase, example: Example, choices: Sequence[str]) -> EncodedExample:
    before, _ = _render(tokenizer, example)
    prompt, *answers = _tokens(tokenizer, [before, *(before + choice for choice in choices)])
    # The last token of the prompt may merge with the answer: what is fed ends before the first difference.
    start = min(common_length([prompt, answer]) for answer in answers)
    first: dict[int, str] = {}
    for choice, answer in zip(choices, answers, strict=True):
        token = answer[start]
        if token in first:
            raise IVONError(
                f"{param_ref('choices')}: {first[token]!r} and {choice!r} start with the same token "
                f"({tokenizer.decode([token])!r}); reword them, or use {param_ref('task')} generate"
            )
        first[token] = choice
    return EncodedExample(prompt[:start], [start - 1], [choices.index(example.answer)], tuple(first))


def _encode_reference(tokenizer: PreTrainedTokenizerBase, example: Example, _: Sequence[str]) -> EncodedExample:
    before, after = _render(tokenizer, example)
    # The token that ends the turn is part of what axolotl trains on.
    end = next((token for token in tokenizer.all_special_tokens if token and after.startswith(token)), "")
    prompt, full = _tokens(tokenizer, [before, before + example.answer + end])
    start = common_length([prompt, full])
    return EncodedExample(full[:-1], list(range(start - 1, len(full) - 1)), full[start:])


def _encode_label(
    tokenizer: PreTrainedTokenizerBase, example: Example, label2id: Mapping[str, int], max_length: int | None
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
        text = str(tokenizer.apply_chat_template(list(example.messages), tokenize=False))
        ids = _tokens(tokenizer, [text])[0][:max_length]
    else:
        text = "\n".join(message["content"] for message in example.messages)
        ids = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    return EncodedExample(ids, [len(ids) - 1], [label])


class Prompt(NamedTuple):
    """A chat as the model reads it: text and token ids after the chat template."""

    text: str
    ids: list[int]
    reference: str | None
    source: str


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Prompt]:
    """Put chats through the chat template: what it writes before an answer in training is the prompt."""
    # `encode` finds where an answer begins; any answer serves.
    items = encode(tokenizer, [Example(chat.messages, "0", chat.source) for chat in chats], "generate")
    prompts = []
    for chat, item in zip(chats, items, strict=True):
        ids = item.ids[: item.positions[0] + 1]
        if not ids:
            raise IVONError(f"{chat.source}: the chat template makes nothing of it; use the template of training")
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        prompts.append(Prompt(text, ids, chat.reference, chat.source))
    return prompts
