"""Structured answers: how many of the outputs agree on each field of the JSON that was chosen."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import IVONError, param_ref
from ..metrics.auroc import auroc
from .uncertainty import or_none

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_NOTHING = object()  # no JSON, or no such field


@dataclass(frozen=True)
class Field:
    """One field of a chosen answer.

    The confidence is the share of the outputs with the same value, or, where the chosen output lacks the field, of
    those whose JSON lacks it too; 0 if the chosen output is no JSON.
    """

    value: Any  # of the field in the chosen output; None if it lacks the field
    present: bool  # whether the chosen output has the field
    confidence: float
    missing: float  # the share of the outputs whose JSON lacks the field
    unparsable: float  # the share of the outputs that are no JSON


def check_fields(given: str) -> tuple[str, ...]:
    """Return the fields of `a,b.c`: different names, or the path to a nested one with dots between."""
    fields = tuple(part.strip() for part in given.split(","))
    if not all(part for field in fields for part in field.split(".")) or len(set(fields)) < len(fields):
        raise IVONError(f"{param_ref('fields')} {given}: give different names with commas between, a,b.c say")
    return fields


def parse_json(text: str) -> Any:
    """Return the object or list in a text: all of it, a fenced block, or from the first brace to the last."""
    fenced = _FENCE.search(text)
    for candidate in (text, fenced[1] if fenced else "", text[text.find("{") : text.rfind("}") + 1]):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(candidate)
            if isinstance(value, (dict, list)):
                return value
    return _NOTHING


def _field(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _NOTHING
    return value


def _canonical(value: Any) -> str:
    """Return a text that equal JSON shares: 1 and 1.0 are equal in any order of keys; True and 1 are not."""

    def number(text: str) -> float:
        return int(value) if (value := float(text)).is_integer() else value

    return json.dumps(json.loads(json.dumps(value), parse_float=number), sort_keys=True)


def compare(texts: Sequence[str], chosen: int, fields: Sequence[str]) -> dict[str, Field]:
    """Return every field of the output at the index `chosen`, with its confidence."""
    documents = [parse_json(text) for text in texts]
    broken = np.array([document is _NOTHING for document in documents])
    compared = {}
    for path in fields:
        values = [_field(document, path) for document in documents]
        missing = np.array([value is _NOTHING for value in values]) & ~broken
        present = values[chosen] is not _NOTHING
        if broken[chosen]:
            agree = np.zeros(len(texts), bool)
        elif not present:
            agree = missing
        else:
            wanted = _canonical(values[chosen])
            agree = np.array([value is not _NOTHING and _canonical(value) == wanted for value in values])
        shares = [float(which.mean()) for which in (agree, missing, broken)]
        compared[path] = Field(values[chosen] if present else None, present, *shares)
    return compared


def is_right(field: Field, path: str, reference: str) -> bool:
    """Say whether a field is that of the reference answer; both may lack it."""
    wanted = _field(parse_json(reference), path)
    if wanted is _NOTHING or not field.present:
        return wanted is _NOTHING and not field.present
    return _canonical(wanted) == _canonical(field.value)


def summarize(
    compared: Sequence[Mapping[str, Field]], references: Sequence[str | None]
) -> dict[str, dict[str, float | None]]:
    """Return, for each field, means over the prompts of `confidence`, `missing` and `unparsable`.

    With a reference for every prompt also `accuracy`, and `auroc` of 1 − the confidence for the field being wrong; else
    None.
    """
    summary = {}
    for path in compared[0]:
        fields = [by_path[path] for by_path in compared]
        values: dict[str, float | None] = {
            name: float(np.mean([getattr(field, name) for field in fields]))
            for name in ("confidence", "missing", "unparsable")
        }
        pairs = [(field, text) for field, text in zip(fields, references, strict=True) if text is not None]
        scored = len(pairs) == len(fields)
        wrong = np.array([not is_right(field, path, reference) for field, reference in pairs])
        area = auroc(np.array([-field.confidence for field, _ in pairs]), wrong)
        values["accuracy"] = float(1 - wrong.mean()) if scored else None
        values["auroc"] = or_none(area) if scored else None
        summary[path] = values
    return summary


def check_outputs(texts: Sequence[str], fields: Sequence[str], source: str) -> None:
    """Raise IVONError if none of the outputs (of the file `source`) is JSON, or none of them has one of the fields."""
    documents = [document for document in map(parse_json, texts) if document is not _NOTHING]
    named = f"{param_ref('fields')} {','.join(fields)}"
    if not documents:
        raise IVONError(f"{named}: none of the {len(texts)} outputs in {source} is JSON, {texts[0][:60]!r} for one")
    for path in fields:
        if all(_field(document, path) is _NOTHING for document in documents):
            first = documents[0]
            keys = ", ".join(first) if isinstance(first, dict) else f"a list of {len(first)}"
            raise IVONError(f"{named}: no output in {source} has {path!r}; the first has {keys}")
