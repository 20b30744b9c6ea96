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
from ..storage.atomic import check_outside, new_file
from ..storage.format import read_json, read_lines, write_json
from .plan import Output

_FIX = f"choose another {param_ref('output')}, or start anew with {param_ref('overwrite')}"


def check_file(path: Path, settings: Mapping[str, Any], overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise IVONError if `NBestFile` would refuse `path` whatever the prompts: worth asking before they are rendered.

    No file is written into one of the folders `inputs`.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise IVONError(f"{param_ref('output')} {path}: not a file in an existing folder; choose another name")
    check_outside(path, inputs)
    if not path.exists() or overwrite:
        return
    if not _settings_path(path).exists():
        raise IVONError(f"{path} exists and was not made by `ivon-post generate`; {_FIX}")
    before = read_json(_settings_path(path))
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise IVONError(f"{path} was made with {name} {before.get(name)!r}, not {value!r}; {_FIX}")


def _settings_path(path: Path) -> Path:
    return path.with_name(path.name + ".settings.json")


class NBestFile:
    """The n-best lists of one run: JSONL, and beside it FILE.settings.json with what they were made with.

    A line holds `{"prompt": text, "reference": text or null, "outputs": [{"text", "member", "logprob"}, …]}`, the
    outputs member by member, and what else is known of them (`append`). Each is on the disk before the next begins;
    half a line at the end, which an interrupt may leave, is dropped.

    Attributes:
        done: how many prompts the file has outputs for.
        abstained: how many of them say `"abstain": true`.

    Raises:
        IVONError: the file is there and was made with other settings or from other prompts, or cannot be written.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], prompts: Sequence[Prompt], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self._settings_path = _settings_path(self.path)
        self._settings = dict(settings)
        self._file: IO[bytes] | None = None
        self._size = 0
        self.done = self.abstained = 0
        self._resumed = self.path.exists() and not overwrite
        check_file(self.path, self._settings, overwrite)
        if self._resumed:
            try:
                self._read(prompts)
            except OSError as error:
                raise IVONError(f"{param_ref('output')} {self.path}: cannot be read ({error.strerror})") from None

    def _read(self, prompts: Sequence[Prompt]) -> None:
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    text = record["prompt"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise IVONError(
                        f"{self.path}:{self.done + 1}: not an n-best list; choose another {param_ref('output')}"
                    ) from None
                if self.done >= len(prompts) or text != prompts[self.done].text:
                    raise IVONError(
                        f"{self.path}:{self.done + 1} answers another prompt than {param_ref('prompts')} has there; "
                        f"{_FIX}"
                    )
                self._size += len(line)
                self.done += 1
                self.abstained += record.get("abstain") is True

    def append(self, prompt: Prompt, outputs: Sequence[Output], known: Mapping[str, Any] | None = None) -> None:
        """Write one prompt's line to the disk, with what is `known` of its outputs.

        Raises:
            IVONError: it cannot be written.
        """
        record = {
            "prompt": prompt.text,
            "reference": prompt.reference,
            **(known or {}),
            "outputs": [{"text": o.text, "member": o.member, "logprob": o.logprob} for o in outputs],
        }
        try:
            if self._file is None:
                self._file = self._open()
            # Half a surrogate pair, which a server may send, becomes its own JSON escape.
            line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._file.write(line + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise IVONError(f"{self.path} cannot be written ({error.strerror})") from None
        self.done += 1
        self.abstained += bool(known and known.get("abstain"))

    def _open(self) -> IO[bytes]:
        if self._resumed:
            os.truncate(self.path, self._size)
            return self.path.open("ab")
        self.path.unlink(missing_ok=True)
        with new_file(self._settings_path) as temporary:
            write_json(temporary, self._settings)
        return self.path.open("xb")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_source(path: str | Path) -> dict[str, Any] | None:
    """Return what the outputs of a file were drawn from: `tau`, `ratio`, and where it is known `mean_sha256`.

    None where nothing beside the file tells.

    Raises:
        IVONError: FILE.settings.json is no JSON object.
    """
    settings_path = Path(f"{path}.settings.json")
    if not settings_path.is_file():
        return None
    settings = read_json(settings_path)
    ensemble = settings.get("ensemble")
    if isinstance(ensemble, dict):
        return {"tau": ensemble.get("tau", 1.0), "ratio": ensemble.get("pruned_ratio", 0.0), "mean_sha256": None}
    return {
        "tau": settings.get("tau", 1.0),
        "ratio": settings.get("prune_ratio", 0.0),
        "mean_sha256": settings.get("adapter"),
    }


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

    `member` is 0 and `logprob` unknown where a line does not tell; an unknown log-probability loses every tie.

    Raises:
        IVONError: the file cannot be read, has no lines, or a line that is not such a list.
    """
    found: list[NBest] = []
    for source, record in read_lines(path, "file"):
        outputs, reference = record.get("outputs"), record.get("reference")
        if not isinstance(outputs, list) or not outputs or not isinstance(reference, str | None):
            raise IVONError(f"{source}: no list of outputs; give what `ivon-post generate` writes")
        for output in outputs:
            values = output if isinstance(output, dict) else {}
            logprob = values.get("logprob")
            known = logprob is None or (isinstance(logprob, int | float) and abs(logprob) < math.inf)
            if not isinstance(values.get("text"), str) or not isinstance(values.get("member", 0), int) or not known:
                raise IVONError(f"{source}: an output has no text, or a member or logprob that is no number")
        found.append(
            NBest(
                str(record.get("prompt", "")),
                reference,
                tuple(output["text"] for output in outputs),
                tuple(output.get("member", 0) for output in outputs),
                tuple(-math.inf if output.get("logprob") is None else output["logprob"] for output in outputs),
                source,
            )
        )
        if len(outputs) != len(found[0].texts):
            raise IVONError(f"{source}: {len(outputs)} outputs, but {len(found[0].texts)} on the first line")
    return found
