"""OpenAI's interface: requests as they come, checked, and responses, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..pieces import Piece, Token, token_facts

MOST_CHOICES = 16
_MOST_STOPS = 16
# What would change an answer and is not done here, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "min_p": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_Model = TypeVar("_Model", bound="Request")


class Refusal(Exception):
    """A request that is not answered, as OpenAI's interface tells it.

    Attributes:
        status: of HTTP.
        param: the field of the request that it is about.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """Return the body of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What a stream has besides."""

    include_usage: bool = False


class Request(BaseModel, ABC):
    """What both kinds of request have. A field that is null is not there; one that nobody knows is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MOST_STOPS)] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    @abstractmethod
    def top(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None: nothing is told of tokens."""


class TextPart(BaseModel):
    """A part of a message; text is all that there is."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: str
    content: str | list[TextPart] = ""

    @field_validator("content", mode="before")
    @classmethod
    def _not_null(cls, content: Any) -> Any:
        return "" if content is None else content

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _newer_name(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def top(self) -> int | None:
        """See `Request`."""
        return self.top_logprobs if self.logprobs else None


_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Request):
    """`POST /v1/completions`: a prompt, as text or token ids, or several."""

    prompt: str | _Tokens | Annotated[list[str] | list[_Tokens], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top(self) -> int | None:
        """See `Request`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], (str, list)) else [self.prompt]  # type: ignore[return-value,list-item]


def read_request(kind: type[_Model], body: object) -> _Model:
    """Return the request that the JSON `body` holds.

    Raises:
        Refusal: it is none.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    for name, neutral in _NEUTRAL.items():
        if (value := body.get(name)) is not None and value not in neutral:
            raise Refusal(400, f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place, said = [str(part) for part in first["loc"]], first["msg"].removeprefix("Value error, ")
        if place[:1] == ["prompt"]:  # of a union pydantic tells each part
            place, said = place[:1], "text, token ids, or a list of either"
        elif "content" in place:
            place, said = place[: place.index("content") + 1], "text, or a list of parts of the type 'text'"
        param = ".".join(place) or None
        raise Refusal(400, f"{param}: {said}" if param else said, param=param) from None


class Writer:
    """Writes the response to one request, in OpenAI's shape with `ivon` as a further field.

    Args:
        choices: how many answers there will be.
    """

    def __init__(self, request: Request, choices: int) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._choices, self._told = choices, request.top is not None
        self._usage_wanted = request.stream_options.include_usage
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._offsets = [0] * choices
        self._begun = [False] * choices
        self._left = choices
        self._first: dict[str, Any] | None = None  # `ivon` of the first answer

    def whole(self, pieces: Iterable[Piece], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the response with all pieces."""
        own: list[list[Piece]] = [[] for _ in range(self._choices)]
        for piece in pieces:
            own[piece.number].append(piece)
        choices = []
        for index, parts in enumerate(own):
            text, tokens = "".join(part.text for part in parts), tuple(token for part in parts for token in part.tokens)
            told: dict[str, Any] = {"text": text}
            if self._chat:
                told = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(Piece(index, text, tokens, parts[-1].finish, parts[-1].ivon), told))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage, "ivon": own[0][-1].ivon}

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        """Yield what a stream has of one piece."""
        index = piece.number
        if self._chat and not self._begun[index]:
            self._begun[index] = True
            told: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk([{"index": index, **told, "logprobs": None, "finish_reason": None}])
        if not (piece.text or piece.tokens or piece.finish):
            return
        told = {"text": piece.text}
        if self._chat:
            told = {"delta": {"content": piece.text} if piece.text or not piece.finish else {}}
        choice = self._choice(piece, told)
        if piece.tokens and not piece.finish:
            choice["ivon"] = {"tokens": list(map(token_facts, piece.tokens))}
        if index == 0 and piece.finish:
            self._first = piece.ivon
        self._left -= piece.finish is not None
        last = {} if self._left or self._usage_wanted else {"ivon": self._first}
        yield self._chunk([choice], **last)

    def end(self, usage: Mapping[str, int]) -> Iterable[dict[str, Any]]:
        """Yield what a stream has after all pieces."""
        if self._usage_wanted:
            yield {**self._chunk([]), "usage": usage, "ivon": self._first}

    def _chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = {"usage": None} if self._usage_wanted else {}
        return {**self._head, "object": kind, "choices": choices, **usage, **more}

    def _choice(self, piece: Piece, told: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = None
        shown = self._told and (piece.tokens or not piece.text)  # of some answers the tokens are not known
        if shown and self._chat:
            logprobs = {"content": list(map(_chat_token, piece.tokens)), "refusal": None}
        elif shown:
            logprobs = self._completion_tokens(piece)
        choice = {"index": piece.number, **told, "logprobs": logprobs, "finish_reason": piece.finish}
        # A client that asks for one answer finds the facts in the response; of several each has its own.
        return choice | {"ivon": piece.ivon} if piece.ivon and self._choices > 1 else choice

    def _completion_tokens(self, piece: Piece) -> dict[str, Any]:
        offsets = []
        for token in piece.tokens:
            offsets.append(self._offsets[piece.number])
            self._offsets[piece.number] += len(token.text)
        return {
            "tokens": [token.name for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{**dict(token.top), token.name: token.logprob} for token in piece.tokens],
            "text_offset": offsets,
        }


def _chat_token(token: Token) -> dict[str, Any]:
    top = [_named(name, logprob) for name, logprob in token.top]
    return {**_named(token.name, token.logprob), "top_logprobs": top}


def _named(name: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character has no text, and with it no bytes that could be told.
    return {"token": name, "logprob": logprob, "bytes": None if "�" in name else list(name.encode())}


def usage(prompt_tokens: int, generated: int) -> dict[str, int]:
    """Return what a response says of its tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }
