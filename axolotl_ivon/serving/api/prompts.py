"""The prompts of requests as tokens: as training rendered them, or as a request wants them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ...data.chats import Example, chat_messages, find_choices
from ...data.encode import ChatFormat, common_length, encode, render
from ...errors import IVONError
from .answer_schema import longest_value
from .protocol import ApiError, ChatRequest, Request


class TokenizedPrompt(NamedTuple):
    """The tokens of a prompt, and those after it of each label, or of the longest JSON object that fits a schema."""

    ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...] = ()


class PromptReader:
    """Turns the prompts of requests into tokens, one request at a time: a tokenizer is not for two threads.

    Args:
        tokenizer: returns the tokenizer; called when a prompt is read.
        chat_format: how training rendered chats.
        labels: the answers of the training data, if they are a few labels that can be asked for.
        check: raises IVONError if a token of a prompt is none of the model's.
    """

    def __init__(
        self,
        tokenizer: Callable[[], Any],
        chat_format: ChatFormat,
        labels: Sequence[str] = (),
        check: Callable[[Sequence[int]], None] = lambda ids: None,
    ) -> None:
        self._tokenizer, self._format, self._check = functools.cache(tokenizer), chat_format, check
        self.labels, self.system_prompt = labels, chat_format.system_prompt
        self._turn = asyncio.Lock()

    async def read(self, request: Request) -> list[TokenizedPrompt]:
        """Return the prompts of a request as tokens; raise ApiError if one is empty, or cannot be rendered."""
        try:
            async with self._turn:
                return await asyncio.to_thread(self._read, request)
        except IVONError as error:
            param = "structured_outputs" if request.labels else request.prompt_field
            raise ApiError(400, str(error), param=param) from None

    def _read(self, request: Request) -> list[TokenizedPrompt]:
        kwargs = request.chat_template_kwargs if isinstance(request, ChatRequest) else None
        longest = ", ".join(f'"{name}": {longest_value(values)}' for name, values in request.fields.items())
        room = (tuple(self.encode(f"{{{longest}}}")),) if longest else ()
        prompts = []
        for prompt in request.prompts:
            if request.labels:
                read = self.encode_labels(prompt, request.labels, kwargs)
            else:
                read = TokenizedPrompt(tuple(self.encode(prompt, kwargs)), room)
            if not read.ids:
                raise IVONError("the prompt is empty")
            self._check(read.ids)
            prompts.append(read)
        return prompts

    def encode(self, prompt: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> Sequence[int]:
        """Return the tokens of a prompt: a text, token ids or the messages of a chat."""
        if isinstance(prompt, str):
            return self._tokenizer()(prompt)["input_ids"]  # type: ignore[no-any-return]
        if isinstance(prompt[0], int):
            return prompt  # type: ignore[no-any-return]
        chat = Example(tuple(self._messages(prompt)), "", "messages")
        return render(self._tokenizer(), [chat], self._with(chat_template_kwargs))[0].ids

    def encode_labels(
        self, prompt: Any, labels: Sequence[str], chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> TokenizedPrompt:
        """Return the tokens of a prompt, and those of each label as its answer.

        A chat without a system message is asked after the system prompt of training, as `predict` asks texts: the
        chat template may otherwise put one of its own there, and labels are what training taught after that prompt.

        Raises:
            IVONError: as `data.encode.encode`; the labels are fewer than two or alike; the prompt is no chat or text.
        """
        labels, tokenizer = find_choices((), labels), self._tokenizer()
        if isinstance(prompt, str):  # labels as they are, after the text
            rows = [tuple(tokenizer(prompt + label)["input_ids"]) for label in labels]
            begun = {row[:length] for row in rows for length in range(1, len(row))}
            rows = [(*row, tokenizer.eos_token_id) if row in begun else row for row in rows]
            start = common_length(rows)
            if start < 1 or len(set(rows)) < len(rows):
                raise IVONError("the prompt is empty, or the model reads two of the choices as the same")
            return TokenizedPrompt(rows[0][:start], tuple(row[start:] for row in rows))
        if isinstance(prompt[0], int):
            raise IVONError("choices go with a text or a chat, not with tokens")
        messages = self._messages(prompt)
        if self.system_prompt and not {"system", "developer"} & {message["role"] for message in messages}:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        example = Example(tuple(messages), labels[0], "messages")
        chat_format = self._with(chat_template_kwargs)
        [item] = encode(tokenizer, [example], "choice", choices=labels, chat_format=chat_format)
        return TokenizedPrompt(tuple(item.ids), item.candidates or ())

    def _messages(self, prompt: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages of a chat; a developer is a system where the template knows no developer."""
        messages = chat_messages({"messages": prompt}, "messages")
        if "developer" not in str(self._tokenizer().chat_template):
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        return messages

    def _with(self, chat_template_kwargs: Mapping[str, Any] | None) -> ChatFormat:
        """Return how a chat is rendered: as all are, with the request's own arguments."""
        if chat_template_kwargs is None:
            return self._format
        chosen = ChatFormat.of({}, chat_template_kwargs)
        return replace(chosen, kwargs={**self._format.kwargs, **chosen.kwargs})
