"""Structured answers: how many of the outputs agree on each field of the JSON that was chosen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import IVONError, param_ref
from ..metrics.auroc import auroc

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_NOTHING = object()  # no JSON, or no such field


@dataclass(frozen=True)
class Field:
    """One field of a chosen answer.

    Attributes:
        value: as the chosen output has it; None if it has none.
        present: whether it has one.
        confidence: the weight of the outputs with the same value, or, where the chosen output lacks the field, of those
            whose JSON lacks it too; 0 if the chosen output is no JSON.
        missing, unparsable: the weight of the outputs whose JSON lacks the field, and of those that are no JSON.
    """

    value: Any
    present: bool
    confidence: float
    missing: float
    unparsable: float


def check_fields(given: str) -> tuple[str, ...]:
    """Return the fields of `a,b.c`: names, and for what lies deeper the way there with dots between.

    Raises:
        IVONError: a name is empty, or given twice.
    """
    fields = tuple(part.strip() for part in given.split(","))
    if not all(part for field in fields for part in field.split(".")) or len(set(fields)) < len(fields):
        raise IVONError(f"{param_ref('fields')} {given}: give different names with commas between, a,b.c say")
    return fields


def parse_json(text: str) -> Any:
    """Return the object or list in a text: all of it, a fenced block, or from the first brace to the last.

    `_NOTHING` if there is none.
    """
    fenced = _FENCE.search(text)
    for candidate in (text, fenced[1] if fenced else "", text[text.find("{") : text.rfind("}") + 1]):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
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


def _same(value: Any) -> str:
    """Return what is equal for equal JSON: 1 and 1.0 are, the order of keys does not count, and True is not 1."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(plain(value), sort_keys=True)


def compare(texts: Sequence[str], weights: np.ndarray, chosen: int, fields: Sequence[str]) -> dict[str, Field]:
    """Return every field of the chosen output, with its confidence; `weights` of the outputs sum to 1."""
    values = [parse_json(text) for text in texts]
    broken = np.array([value is _NOTHING for value in values])
    found = {}
    for path in fields:
        own = [_field(value, path) for value in values]
        lacking = np.array([value is _NOTHING for value in own]) & ~broken
        if broken[chosen]:
            agree = np.zeros(len(values), bool)
        elif lacking[chosen]:
            agree = lacking
        else:
            same = _same(own[chosen])
            agree = np.array([value is not _NOTHING and _same(value) == same for value in own])
        present = own[chosen] is not _NOTHING
        shares = [round(float(weights[which].sum()), 12) for which in (agree, lacking, broken)]
        found[path] = Field(own[chosen] if present else None, present, *shares)
    return found


def is_right(field: Field, path: str, reference: str) -> bool:
    """Say whether a field is that of the reference answer; both may lack it."""
    wanted = _field(parse_json(reference), path)
    if wanted is _NOTHING or not field.present:
        return wanted is _NOTHING and not field.present
    return _same(wanted) == _same(field.value)


def summarize(
    found: Sequence[Mapping[str, Field]], references: Sequence[str | None]
) -> dict[str, dict[str, float | None]]:
    """Return, for each field, means over the prompts of `confidence`, `missing` and `unparsable`.

    With a reference for every prompt also `accuracy`, and `auroc` of 1 − the confidence for the field being wrong; else
    None.
    """
    told = {}
    for path in found[0]:
        own = [fields[path] for fields in found]
        numbers = ("confidence", "missing", "unparsable")
        values: dict[str, float | None] = {n: float(np.mean([getattr(one, n) for one in own])) for n in numbers}
        pairs = [(one, reference) for one, reference in zip(own, references, strict=True) if reference is not None]
        accuracy = area = math.nan
        if len(pairs) == len(own):
            wrong = np.array([not is_right(one, path, reference) for one, reference in pairs])
            accuracy = float(1 - wrong.mean())
            area = float(auroc(np.array([-one.confidence for one in own]), wrong))
        for name, value in (("accuracy", accuracy), ("auroc", area)):
            values[name] = None if math.isnan(value) else value
        told[path] = values
    return told


def check_outputs(texts: Sequence[str], fields: Sequence[str], source: str) -> None:
    """Raise IVONError if none of the outputs (of the file `source`) is JSON, or none of them has one of the fields."""
    values = [value for value in map(parse_json, texts) if value is not _NOTHING]
    told = f"{param_ref('fields')} {','.join(fields)}"
    if not values:
        raise IVONError(f"{told}: none of the {len(texts)} outputs in {source} is JSON, {texts[0][:60]!r} for one")
    for path in fields:
        if all(_field(value, path) is _NOTHING for value in values):
            keys = ", ".join(values[0]) if isinstance(values[0], dict) else f"a list of {len(values[0])}"
            raise IVONError(f"{told}: no output in {source} has {path!r}; the first has {keys}")
