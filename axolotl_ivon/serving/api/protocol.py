"""OpenAI's interface: requests, checked, and responses, whole and in chunks."""

from __future__ import annotations

import itertools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from .answer_schema import FieldValues, field_values
from .answers import AnswerDelta, Token

MAX_CHOICES = 16
MAX_LABELS = 1000
_MAX_STOPS = 16
# Parameters that would change an answer and are not supported, with the values that change nothing.
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
    "response_format": ({"type": "text"},),  # of completions; chats have schemas, too
    "modalities": (["text"],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
# Those that change no answer. Whatever else is unknown is refused.
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "request_id", "priority",
}  # fmt: skip
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is refused, or that failed."""

    status: int  # HTTP's
    message: str
    param: str | None = None  # the field of the request that is wrong
    code: str | None = None  # a word for programs
    headers: Mapping[str, str] = field(default_factory=dict)  # of the response

    def __str__(self) -> str:
        return self.message

    def document(self) -> dict[str, Any]:
        """Return the body of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


_Labels = Annotated[list[str], Field(min_length=1, max_length=MAX_LABELS)]


class StructuredOutputs(BaseModel):
    """vLLM's constraints on an answer, of which choices are supported."""

    model_config = ConfigDict(extra="forbid")
    choice: _Labels


class Request(BaseModel, ABC):
    """The fields of both kinds of request. A field that is null counts as absent."""

    model_config = ConfigDict(strict=True, extra="ignore")
    path: ClassVar[str]  # where such a request is posted, below /v1/
    prompt_field: ClassVar[str]  # the name of the field that holds the prompt

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MAX_STOPS)] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    structured_outputs: StructuredOutputs | None = None
    guided_choice: _Labels | None = None  # the same by its former name

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _of_labels_or_tokens(self) -> Self:
        if self.labels and self.top is not None:
            raise ValueError("logprobs are of tokens; the probabilities of choices are in `ivon.choices`")
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def labels(self) -> list[str]:
        """The strings of which the answer is one; empty: it is any text."""
        return self.structured_outputs.choice if self.structured_outputs else self.guided_choice or []

    @property
    def fields(self) -> dict[str, FieldValues]:
        """The fields of the JSON object that the answer is, each with its values; empty: it is none."""
        return {}

    @property
    @abstractmethod
    def top(self) -> int | None:
        """The number of likeliest tokens to return at each place; None: no tokens are returned."""

    @property
    @abstractmethod
    def prompts(self) -> Sequence[Any]:
        """The prompts: the messages of a chat (role and content), texts, or token ids."""


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat; fields beside these (`tool_calls`, `name`, …) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message with its content as one text, and without fields that are null."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {
            "role": self.role,
            "content": text,
            **{k: v for k, v in (self.model_extra or {}).items() if v is not None},
        }


class TextFormat(BaseModel):
    """An answer of any text."""

    type: Literal["text"]


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str = ""
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")

    @field_validator("schema_")
    @classmethod
    def _has_fields_of_few_values(cls, schema: dict[str, Any]) -> dict[str, Any]:
        field_values(schema)
        return schema


class SchemaFormat(BaseModel):
    """An answer that is a JSON object, whose fields have a few values each, or are short strings."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    path = "chat/completions"
    prompt_field = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] | None = None  # as vLLM has it
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None

    @model_validator(mode="after")
    def _newer_name(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.fields and (self.labels or self.logprobs or self.n > 1):
            raise ValueError("a json_schema goes with one answer, without logprobs and choices of its own")
        return self

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def fields(self) -> dict[str, FieldValues]:
        asked = self.response_format
        return field_values(asked.json_schema.schema_) if isinstance(asked, SchemaFormat) else {}

    @property
    def prompts(self) -> list[list[dict[str, Any]]]:
        return [[message.plain() for message in self.messages]]


class ClassifyRequest(BaseModel):
    """`POST /classify`, in vLLM's form; `choices` are by default the answers of the training data."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    choices: _Labels | None = None

    @field_validator("input")
    @classmethod
    def _has_no_empty_text(cls, given: str | list[str]) -> str | list[str]:
        for number, text in enumerate([given] if isinstance(given, str) else given, start=1):
            if not text.strip():
                raise ValueError(f"text {number} is empty; leave it out")
        return given

    def requests(self, labels: Sequence[str]) -> list[ChatRequest]:
        """Return a request for each text; the answer is the most probable label."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        chat = {"model": self.model, "guided_choice": list(labels), "temperature": 0.0}
        return [ChatRequest(**chat, messages=[Message(role="user", content=text)]) for text in texts]  # type: ignore[arg-type]

    @staticmethod
    def field_of(param: str | None) -> str | None:
        """Return the field that a field of its chats comes from."""
        return {"messages": "input", "structured_outputs": "choices"}.get(param or "", param)


_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Request):
    """`POST /v1/completions`: a prompt, as text or token ids, or several."""

    path = "completions"
    prompt_field = "prompt"
    prompt: str | _Tokens | Annotated[list[str] | list[_Tokens], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], (str, list)) else [self.prompt]  # type: ignore[return-value,list-item]


def read_request(kind: type[_Model], body: object) -> _Model:
    """Return the request in a JSON body; raise ApiError if it is none."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name, value in body.items():
        if value is None or name in kind.model_fields or name in _WITHOUT_EFFECT or value in _NEUTRAL.get(name, ()):
            continue
        message = f"{name[:100]} is not supported here; leave it out"
        raise ApiError(400, message, param=name[:100], code="unsupported_parameter")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place, message = [str(part) for part in first["loc"]], first["msg"].removeprefix("Value error, ")
        if place == ["response_format"] and first["type"].startswith("union_tag"):
            given = body[place[0]].get("type") or "without a type"
            message = f"{str(given)[:100]} is not supported here; give a json_schema"
        elif place[:1] == ["prompt"]:  # pydantic's place and message are of one type of the union
            place, message = place[:1], "text, token ids, or a list of either"
        elif place[:1] == ["input"] and len(place) > 1:
            place, message = place[:1], f"give a text, or a list of 1 to {MAX_CHOICES} texts"
        elif "content" in place:
            place, message = place[: place.index("content") + 1], "text, or a list of parts of the type 'text'"
        param = ".".join(place) or None
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from None


class Writer:
    """Writes the response to one request of `choices` answers, in OpenAI's shape with the further field `ivon`."""

    def __init__(self, request: Request, choices: int) -> None:
        self._chat, self._choices = isinstance(request, ChatRequest), choices
        self._with_tokens, self._with_usage = request.top is not None, request.stream_options.include_usage
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._tokens: list[list[Token]] = [[] for _ in range(choices)]
        self._offsets = [0] * choices
        self._roles_due = set(range(choices)) if self._chat else set()
        self._unfinished = choices
        self._first: dict[str, Any] | None = None  # `ivon` of the first answer

    def whole(self, deltas: Iterable[AnswerDelta], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the response with all deltas."""
        answers: list[list[AnswerDelta]] = [[] for _ in range(self._choices)]
        for delta in deltas:
            answers[delta.number].append(self._with_its_tokens(delta))
        choices = []
        for index, parts in enumerate(answers):
            text = "".join(part.text for part in parts)
            tokens = tuple(token for part in parts for token in part.tokens)
            content: dict[str, Any] = {"text": text}
            if self._chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(parts[-1]._replace(number=index, text=text, tokens=tokens), content))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage, "ivon": answers[0][-1].ivon}

    def chunks(self, delta: AnswerDelta) -> Iterable[dict[str, Any]]:
        """Yield the events of a stream for one delta."""
        index, delta = delta.number, self._with_its_tokens(delta)
        if index in self._roles_due:
            self._roles_due.remove(index)
            role = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk([{"index": index, **role, "logprobs": None, "finish_reason": None}])
        if not (delta.text or delta.tokens or delta.finish):
            return
        content: dict[str, Any] = {"text": delta.text}
        if self._chat:
            content = {"delta": {"content": delta.text} if delta.text or not delta.finish else {}}
        choice = self._choice(delta, content)
        if delta.tokens and not delta.finish:
            choice["ivon"] = {"tokens": [token.certainty() for token in delta.tokens]}
        if index == 0 and delta.finish:
            self._first = delta.ivon
        self._unfinished -= delta.finish is not None
        last = {} if self._unfinished or self._with_usage else {"ivon": self._first}
        yield self._chunk([choice], **last)

    def end(self, usage: Mapping[str, int]) -> Iterable[dict[str, Any]]:
        """Yield the events of a stream after all deltas."""
        if self._with_usage:
            yield {**self._chunk([]), "usage": usage, "ivon": self._first}

    def _with_its_tokens(self, delta: AnswerDelta) -> AnswerDelta:
        """Return a delta without tokens if the request asks for none, else the last with those of the whole answer."""
        if not self._with_tokens:
            return delta._replace(tokens=())
        tokens = self._tokens[delta.number]
        tokens += delta.tokens
        if delta.ivon is None or (delta.text and not tokens):  # the tokens of some answers are unknown
            return delta
        return delta._replace(ivon=delta.ivon | {"tokens": [token.certainty() for token in tokens]})

    def _chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = {"usage": None} if self._with_usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage, **more}

    def _choice(self, delta: AnswerDelta, content: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(delta) if self._with_tokens and (delta.tokens or not delta.text) else None
        choice = {"index": delta.number, **content, "logprobs": logprobs, "finish_reason": delta.finish}
        # The response has `ivon` of a single answer; each of several has its own.
        return choice | {"ivon": delta.ivon} if delta.ivon and self._choices > 1 else choice

    def _logprobs(self, delta: AnswerDelta) -> dict[str, Any]:
        def entry(name: str, logprob: float) -> dict[str, Any]:
            # A token that is part of a character has no text, and so no bytes.
            return {"token": name, "logprob": logprob, "bytes": None if "�" in name else list(name.encode())}

        if self._chat:
            content = [
                {**entry(token.name, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]}
                for token in delta.tokens
            ]
            return {"content": content, "refusal": None}
        starts = [*itertools.accumulate((len(t.text) for t in delta.tokens), initial=self._offsets[delta.number])]
        self._offsets[delta.number] = starts.pop()
        return {
            "tokens": [token.name for token in delta.tokens],
            "token_logprobs": [token.logprob for token in delta.tokens],
            "top_logprobs": [{**dict(token.top), token.name: token.logprob} for token in delta.tokens],
            "text_offset": starts,
        }


def usage(prompt_tokens: int, generated: int) -> dict[str, int]:
    """Return the field `usage` of a response."""
    total = prompt_tokens + generated
    return {"prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": total}
