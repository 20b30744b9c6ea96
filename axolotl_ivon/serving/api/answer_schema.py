"""JSON schemas of an answer whose fields have a few values each: every value then has a probability.

A library for grammars constrains an answer token by token, and so tells the probability of tokens. Here a field is a
choice between whole values, which is what is asked for. Only a short string is written token by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_VALUES = 1000  # of a field
MAX_CHARACTERS = 64  # of a string
_ABOUT = {"title", "description", "default", "examples", "$schema", "$comment"}  # keywords that exclude no value
_OF_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_RANGE = {"minimum": 0, "exclusiveMinimum": 1, "maximum": 0, "exclusiveMaximum": -1}  # what each adds to a bound


class FreeString(NamedTuple):
    """The values of a field that is a string of at most so many characters, of which JSON escapes none."""

    characters: int

    def allows(self, text: str) -> bool:
        """Say whether a value may go on so after its opening quote; "\ufffd" is a part of a character."""
        return bool(re.fullmatch(rf'[^"\\\x00-\x1f\ufffd]{{0,{self.characters}}}("[\s,}}]*)?', text))


FieldValues = list[str] | FreeString


def longest_value(values: FieldValues) -> str:
    """Return the longest value of a field as JSON, or a text of at least as many tokens as a string may have."""
    return f'"{"0a" * values.characters}"' if isinstance(values, FreeString) else max(values, key=len)


def field_values(schema: Mapping[str, Any]) -> dict[str, FieldValues]:
    """Return for each field of an object, in order, its values as JSON texts, or how long a string it may be.

    Raises:
        ValueError: the schema is no object with fields; or a field has no `enum`, and is neither a boolean nor an
            integer with both bounds nor a string of limited length. It names the field.
    """
    properties, definitions = schema.get("properties"), dict[str, Any]()
    for name in ("definitions", "$defs"):
        if isinstance(held := schema.get(name), dict):
            definitions |= {f"#/{name}/{key}": value for key, value in held.items() if isinstance(value, dict)}
    if schema.get("type") != "object" or not isinstance(properties, dict) or not properties:
        raise ValueError("the schema is no object with properties; give one")
    if unknown := schema.keys() - _OF_OBJECT - _ABOUT:
        raise ValueError(f"the schema's {min(unknown)} is not supported; leave it out")
    fields = dict[str, FieldValues]()
    for name, field in properties.items():
        if isinstance(field, dict):
            field = {**definitions.get(str(field.get("$ref")), {}), **{k: v for k, v in field.items() if k != "$ref"}}
        if string := _free_string(field):
            fields[name] = string
            continue
        values = _values(field) if isinstance(field, dict) else []
        if not 0 < len(values) <= MAX_VALUES:
            raise ValueError(
                f"the field {name} needs an enum, or the type boolean, or integer with minimum and maximum (at most "
                f"{MAX_VALUES} values), or string with a maxLength of at most {MAX_CHARACTERS}"
            )
        fields[name] = list(dict.fromkeys(json.dumps(value, ensure_ascii=False) for value in values))
    return fields


def _free_string(field: Any) -> FreeString | None:
    """Return a field that is a string of which nothing but the greatest length is given, if it is a short one."""
    if not isinstance(field, dict) or field.get("type") != "string" or field.keys() - _ABOUT != {"type", "maxLength"}:
        return None
    most = field["maxLength"]
    return FreeString(most) if type(most) is int and 0 < most <= MAX_CHARACTERS else None


def _values(field: Mapping[str, Any]) -> list[Any]:
    """Return the values of a field; none if they are not a few, or other keywords exclude some."""
    named = field.keys() - _ABOUT - {"type"}
    if named == {"enum"}:
        return field["enum"] if isinstance(field["enum"], list) else []
    if named == {"const"}:
        return [field["const"]]
    if field.get("type") == "boolean" and not named:
        return [True, False]
    bounds = {name: field[name] + _RANGE[name] for name in named & _RANGE.keys() if type(field[name]) is int}
    low, high = ([bounds[name] for name in bounds if name.lower().endswith(end)] for end in ("minimum", "maximum"))
    if field.get("type") != "integer" or len(bounds) < len(named) or not (low and high):
        return []
    return list(range(max(low), min(max(low) + MAX_VALUES, min(high)) + 1))
