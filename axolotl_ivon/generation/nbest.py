"""n-best lists on the disk: written by `ivon-post generate`, read by `ivon-post mbr`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.encode import Prompt
from ..errors import IVONError, param_ref
from ..records.nbest import NBestRecord, NBestSettings
from ..records.resumable import FIX, ResumableFile, settings_path
from .plan import Output


class NBestFile(ResumableFile):
    """The n-best lists of one run, a `records.nbest.NBestRecord` a line.

    `done` prompts have outputs, `abstained` of them say `"abstain": true`. Arguments as those of `ResumableFile`.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        super().__init__(path, settings, "ivon-post generate", overwrite, inputs)
        self.abstained = 0

    def resume(self, prompts: Sequence[Prompt]) -> int:
        """Return how many of the prompts the file has outputs for; raise IVONError if it was made from others."""
        for source, line in self._lines():
            try:
                record = json.loads(line)
                text, reference = record["prompt"], record.get("reference")
            except (ValueError, KeyError, TypeError, RecursionError):
                raise IVONError(f"{source}: not an n-best list; choose another {param_ref('output')}") from None
            if self.done >= len(prompts) or text != prompts[self.done].text:
                raise IVONError(f"{source} answers another prompt than {param_ref('prompts')} has there; {FIX}")
            if reference != prompts[self.done].reference:
                raise IVONError(f"{source} has another reference than {param_ref('prompts')} has there; {FIX}")
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
        # Half a surrogate pair, which a server may send, becomes its own JSON escape.
        self._write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        self.abstained += bool(judged and judged.get("abstain"))


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
