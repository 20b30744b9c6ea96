"""What all documents share: how a file is read, checked and written, and how a mistake in it is told."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from typing_extensions import Self

from ..errors import IVONError, param_ref
from ..storage.atomic import new_file
from ..storage.format import read_json, read_lines


class Record(BaseModel):
    """A JSON object with typed fields. Fields that are not known are kept, so files of other versions load.

    Numbers are finite; `Tau` alone may be infinite. A field that a version did not write has its default, and `dump`
    leaves it out again.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)

    written_by: ClassVar[str] = "ivon-post"  # the command

    @classmethod
    def load(cls, path: str | Path, name: str) -> Self:
        """Read a record from a JSON file; `name` is the parameter that gave the path.

        Raises:
            IVONError: the file cannot be read, or a field is missing or wrong.
        """
        try:
            values = read_json(Path(path))
        except IVONError as error:
            raise IVONError(f"{param_ref(name)} cannot be read: {error}; {cls._fix()}") from None
        return cls.parse(values, f"{param_ref(name)} {path}")

    @classmethod
    def load_lines(cls, path: str | Path, name: str) -> Iterator[tuple[str, Self]]:
        """Yield (`FILE:LINE`, record) for every line of a JSONL file; `name` is the parameter that gave the path."""
        for source, values in read_lines(path, name):
            yield source, cls.parse(values, source)

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> Self:
        """Check `values`; raise IVONError with the first field that is missing or wrong, after `source`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise IVONError(f"{source}: {_first(error)}; {cls._fix()}") from None

    @classmethod
    def _fix(cls) -> str:
        return f"give what `{cls.written_by}` writes"

    def dump(self) -> dict[str, Any]:
        """Return the record as JSON holds it, without the fields that were never set."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def save(self, path: Path) -> None:
        """Write the record to a JSON file, whole or not at all."""
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(self.dump(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_lines(path: Path, records: Iterable[Record]) -> None:
    """Write records to a JSONL file, whole or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.dump(), ensure_ascii=False, allow_nan=False) + "\n")


def _first(error: ValidationError) -> str:
    """Return in words what is wrong with the first wrong field."""
    first = error.errors()[0]
    *outer, last = first["loc"] or ("it",)
    if first["type"] == "missing":
        return f"{_place(outer)}{': ' * bool(outer)}it has no `{last}`"
    wanted = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    must = wanted.replace("Input should be", "it must be")
    return f"{_place([*outer, last])} is {reprlib.repr(first['input'])}; {must[:1].lower()}{must[1:]}"


def _place(location: Iterable[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _from_json(value: Any) -> Any:
    if value == "inf":
        return math.inf
    if isinstance(value, str):
        raise ValueError('it must be a number > 0, or "inf"')
    return value


Tau = Annotated[
    float,
    Field(gt=0, allow_inf_nan=True),
    BeforeValidator(_from_json),
    PlainSerializer(lambda tau: "inf" if math.isinf(tau) else tau),
]
"""A temperature of a posterior: a number above 0, or "inf" for the mean."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
