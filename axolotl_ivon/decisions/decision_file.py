"""Decisions as lines: JSON for programs, CSV for spreadsheets; on the disk they can be continued. Imports no torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.chats import Example
from ..errors import IVONError, param_ref
from ..records.decision import Decision
from ..records.resumable import FIX, ResumableFile

_COLUMNS = ("line", "text", "label", "confidence", "abstain", "set", "expected_entropy", "mutual_information")


class DecisionLines:
    """How decisions are written, a line each; in CSV the probabilities follow, a column for each of `choices`."""

    def __init__(self, form: str, choices: Sequence[str]) -> None:
        self.form, self._choices = form, choices
        self.head = [_csv([*_COLUMNS, *(f"p({choice})" for choice in choices)])] if form == "csv" else []

    def line(self, example: Example, decision: Decision) -> str:
        """Return the line of a decision about an example."""
        record = decision.model_copy(update={"line": example.line, "text": example.question})
        if self.form == "jsonl":
            return json.dumps(record.dump(), ensure_ascii=False, allow_nan=False)
        values = record.model_dump()
        values["text"] = _on_one_line(example.question)
        values["set"] = None if decision.set is None else "|".join(decision.set)
        return _csv([*(values[name] for name in _COLUMNS), *map(decision.probabilities.__getitem__, self._choices)])

    def read(self, line: str, example: Example) -> tuple[str, bool] | None:
        """Return the label of a line that was written earlier, and whether it abstains; None: of another text."""
        try:
            if self.form == "csv":
                number, text, label, _, abstain, *_ = next(csv.reader([line]))
                known = (number, text) == (str(example.line), _on_one_line(example.question))
                return (label, abstain == "True") if known else None
            record = json.loads(line)
            known = (record["line"], record["text"]) == (example.line, example.question)
            return (str(record["label"]), record.get("abstain") is True) if known else None
        except (ValueError, KeyError, TypeError, RecursionError, csv.Error, StopIteration):
            return None


def _on_one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _csv(values: Sequence[Any]) -> str:
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow("" if value is None else value for value in values)
    return row.getvalue()


class DecisionFile(ResumableFile):
    """The decisions of one run, a line for each text; an interrupted run continues it with the same settings.

    A line has the last message alone. So the settings also hold the number of texts so far, and a digest of their
    conversations with all messages and tools: a run on others is refused. Of the lines that an earlier run has written,
    `labels` counts the labels, and `abstained` those that abstain.
    """

    def __init__(
        self,
        path: str | Path,
        lines: DecisionLines,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
    ) -> None:
        super().__init__(path, {**settings, "format": lines.form}, "ivon-post predict", overwrite, inputs)
        self._format = lines
        self.labels, self.abstained = Counter[str](), 0
        self._texts, self._digest = 0, hashlib.sha256()

    def resume(self, examples: Iterator[Example]) -> int:
        """Take what an earlier run has decided from `examples`, and return how many that are.

        Raises:
            IVONError: the file is about other texts, or other conversations that end in them.
        """
        heads = len(self._format.head)
        for source, raw in self._lines():
            line = raw.decode("utf-8", "replace")
            other = IVONError(f"{source} is about another text than {param_ref('data')} has there; {FIX}")
            if self.done < heads:
                if line != self._format.head[0]:
                    raise other
                continue
            example = next(examples, None)
            if example is None:
                raise IVONError(f"{source} is about one text more than {param_ref('data')} has; {FIX}")
            if (written := self._format.read(line, example)) is None:
                raise other
            self._count(example)
            self.labels[written[0]] += 1
            self.abstained += written[1]
        return max(0, self.done - heads)

    def append(self, decided: Sequence[tuple[Example, Decision]]) -> None:
        """Write decisions to the disk; without any, the file is there all the same.

        Raises:
            IVONError: it cannot be written, or as `resume` does, if lines were lost that the digest is about.
        """
        for example, _ in decided:
            self._count(example)
        head = self._format.head[self.done :]
        lines = [*head, *(self._format.line(example, decision) for example, decision in decided)]
        self._write(*(line.encode("utf-8", "backslashreplace") for line in lines))
        before = self._before.get("texts")
        if decided and not (isinstance(before, int) and before > self._texts):
            self._save_settings(texts=self._texts, texts_sha256=self._digest.hexdigest())

    def _count(self, example: Example) -> None:
        """Add a conversation to the digest, and compare that with the one of an earlier run after as many."""
        conversation = [list(map(dict, example.messages)), example.tools, example.plain]
        self._digest.update(json.dumps(conversation, sort_keys=True).encode() + b"\n")
        self._texts += 1
        if self._texts == self._before.get("texts") and self._digest.hexdigest() != self._before.get("texts_sha256"):
            raise IVONError(
                f"{self.path} is about other conversations than {param_ref('data')} has: an earlier message or a tool "
                f"differs in the first {self._texts}; {FIX}"
            )
