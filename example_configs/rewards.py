"""Prompts and rewards of the YAMLs called `reinforce`; they name them by this module."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Chats = Sequence[Sequence[dict[str, str]]]


def question(cfg: Any, *args: Any, **kwargs: Any) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    """Take a chat but for its last turn as the prompt, and that turn as the answer."""

    def transform(row: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
        *prompt, last = row["messages"]
        return {"prompt": prompt, "answer": last["content"]}

    return transform, {"remove_columns": ["messages"]}


def named(completions: Chats, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for a sentence with the answer, a half for the answer in words that were cut off, and 0 otherwise."""
    texts = [completion[-1]["content"].strip() for completion in completions]
    return [
        0.0 if right not in text else 1.0 if text == right or text.endswith(".") else 0.5
        for text, right in zip(texts, answer, strict=True)
    ]


def problem(cfg: Any, *args: Any, **kwargs: Any) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    """Take a problem of GSM8K as the prompt, and its result as the answer."""

    def transform(row: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
        prompt = [{"role": "user", "content": row["question"]}]
        return {"prompt": prompt, "answer": row["answer"].rpartition("####")[2].strip()}

    return transform, {"remove_columns": ["question"]}


def result(completions: Chats, answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the last number of a completion is the answer, and 0 otherwise."""
    numbers = [re.findall(r"-?[\d,]*\d(?:\.\d+)?", completion[-1]["content"]) for completion in completions]
    lasts = [each[-1].replace(",", "") if each else "" for each in numbers]
    return [float(last == right.replace(",", "")) for last, right in zip(lasts, answer, strict=True)]
