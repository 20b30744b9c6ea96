"""n-best lists on the disk: written by `ivon-post generate`, read by `ivon-post mbr`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..data.encode import Prompt
from ..errors import IVONError, param_ref
from ..records.nbest import NBestRecord, NBestSettings, settings_path
from ..storage.atomic import check_outside, new_file
from ..storage.format import read_json, write_json
from .plan import Output

_FIX = f"choose another {param_ref('output')}, or start anew with {param_ref('overwrite')}"


class NBestFile:
    """The n-best lists of one run: JSONL, and beside it FILE.settings.json with what they were made with.

    A line is a `records.nbest.NBestRecord`. Each is on the disk before the next begins; half a line at the end, which
    an interrupt may leave, is dropped. `done` prompts have outputs (0 before `resume`), `abstained` of them say
    `"abstain": true`.

    Args:
        settings: what the outputs depend on; a file that was made with others is refused.
        overwrite: start the file anew.
        inputs: folders into which no file is written.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        self.path, self._settings = Path(path), dict(settings)
        self._file: IO[bytes] | None = None
        self._size = self.done = self.abstained = 0
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise IVONError(f"{param_ref('output')} {path}: not a file in an existing folder; choose another name")
        check_outside(self.path, inputs)
        self._resumed = self.path.exists() and not overwrite
        if not self._resumed:
            return
        if not settings_path(path).exists():
            raise IVONError(f"{path} exists and was not made by `ivon-post generate`; {_FIX}")
        before = read_json(settings_path(path))
        for name, value in json.loads(json.dumps(self._settings)).items():
            if before.get(name) != value:
                raise IVONError(f"{path} was made with {name} {before.get(name)!r}, not {value!r}; {_FIX}")

    def resume(self, prompts: Sequence[Prompt]) -> int:
        """Return how many of the prompts the file has outputs for; raise IVONError if it was made from others."""
        try:
            content = self.path.read_bytes() if self._resumed else b""
        except OSError as error:
            raise IVONError(f"{param_ref('output')} {self.path}: cannot be read ({error.strerror})") from None
        for line in content.split(b"\n")[:-1]:  # the last is empty, or half a line
            source = f"{self.path}:{self.done + 1}"
            try:
                record = json.loads(line)
                text = record["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise IVONError(f"{source}: not an n-best list; choose another {param_ref('output')}") from None
            if self.done >= len(prompts) or text != prompts[self.done].text:
                raise IVONError(f"{source} answers another prompt than {param_ref('prompts')} has there; {_FIX}")
            self._size += len(line) + 1
            self.done += 1
            self.abstained += record.get("abstain") is True
        return self.done

    def append(self, prompt: Prompt, outputs: Sequence[Output], judged: Mapping[str, Any] | None = None) -> None:
        """Write one prompt's line to the disk, with further fields: how its outputs were `judged`."""
        record = {
            "prompt": prompt.text,
            "reference": prompt.reference,
            **(judged or {}),
            "outputs": [{"text": o.text, "member": o.member, "logprob": o.logprob} for o in outputs],
        }
        try:
            self._file = self._file or self._open()
            # Half a surrogate pair, which a server may send, becomes its own JSON escape.
            line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._file.write(line + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise IVONError(f"{self.path} cannot be written ({error.strerror})") from None
        self.done += 1
        self.abstained += bool(judged and judged.get("abstain"))

    def _open(self) -> IO[bytes]:
        if self._resumed:
            os.truncate(self.path, self._size)
            return self.path.open("ab")
        self.path.unlink(missing_ok=True)
        with new_file(settings_path(self.path)) as temporary:
            write_json(temporary, self._settings)
        return self.path.open("xb")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_source(path: str | Path) -> dict[str, Any] | None:
    """Return what the outputs of a file were drawn from (`NBestSettings.source`); None without FILE.settings.json."""
    settings = settings_path(path)
    return NBestSettings.load(settings, "files").source if settings.is_file() else None


@dataclass(frozen=True)
class NBest:
    """One prompt's outputs: a line of what `ivon-post generate` writes; `source` is `FILE:LINE`."""

    prompt: str
    reference: str | None
    texts: tuple[str, ...]
    members: tuple[int, ...]
    logprobs: tuple[float, ...]
    source: str


def read_nbest(path: str | Path) -> list[NBest]:
    """Read n-best lists, which need as many outputs on each line.

    An unknown log-probability, which is -inf, loses every tie.
    """
    nbests: list[NBest] = []
    for source, record in NBestRecord.load_lines(path, "files"):
        outputs = [(o.text, o.member, -math.inf if o.logprob is None else o.logprob) for o in record.outputs]
        texts, members, logprobs = zip(*outputs, strict=True)
        nbests.append(NBest(record.prompt, record.reference, texts, members, logprobs, source))
        if len(texts) != len(nbests[0].texts):
            raise IVONError(f"{source}: {len(texts)} outputs, but {len(nbests[0].texts)} on the first line")
    return nbests
