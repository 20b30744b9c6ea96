"""What the commands make of the tiny adapter and of one another's files: each made once, when first asked for."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from command_line import Cli

_DRAWS = ("--samples", 2, "--seed", 3)


class Pipeline:
    """Documents of one adapter, to be read and never written to.

    Attributes:
        adapter: the tiny adapter, with σ.
        folder: where the documents lie.
    """

    def __init__(self, adapter: Path, folder: Path) -> None:
        self.adapter, self.folder, self._ivon_post = adapter, folder, Cli()

    @cached_property
    def chats(self) -> Path:
        """24 questions with the answers A and B."""
        from tiny import write_chats

        return write_chats(self.folder / "chats.jsonl", count=24)

    @cached_property
    def other_chats(self) -> Path:
        """12 others."""
        from tiny import write_chats

        return write_chats(self.folder / "other.jsonl", count=12, seed=1)

    @cached_property
    def evaluation(self) -> Path:
        """What `eval --json` prints, with examples out of the distribution and fitted temperatures."""
        data = ("--data", self.chats, "--ood", self.other_chats, "--calibrate", self.other_chats, "--ratio", 0.1)
        text = self._ivon_post("eval", self.adapter, *data, *_DRAWS, "-o", self.folder / "examples.jsonl", "--json")
        (self.folder / "eval.json").write_text(text)
        return self.folder / "eval.json"

    @cached_property
    def examples(self) -> Path:
        """What `eval --output` writes."""
        assert self.evaluation
        return self.folder / "examples.jsonl"

    @cached_property
    def recommended(self) -> Path:
        """The recommended.json of `sweep`."""
        grid, folder = ("--tau", "1,inf", "--ratio", 0), self.folder / "swept"
        self._ivon_post("sweep", self.adapter, "--data", self.chats, *_DRAWS, *grid, "-o", folder)
        return folder / "recommended.json"

    @cached_property
    def influence(self) -> Path:
        """What `influence` writes."""
        self._ivon_post("influence", self.adapter, "--data", self.chats, "-o", self.folder / "influence.jsonl")
        return self.folder / "influence.jsonl"

    @cached_property
    def outputs(self) -> Path:
        """What `generate` writes: 4 outputs of 2 draws for each of 4 prompts."""
        options = ("-n", 4, "--per-model", 2, "--max-tokens", 6, "--limit", 4)
        self._ivon_post("generate", self.adapter, "-p", self.chats, *options, "-o", self.folder / "outputs.jsonl")
        return self.folder / "outputs.jsonl"

    @cached_property
    def card(self) -> Path:
        """A copy of the adapter whose card has the evaluation and the recommendation."""
        folder = Path(shutil.copytree(self.adapter, self.folder / "adapter"))
        self._ivon_post("card", folder, "--results", self.evaluation, "--recommended", self.recommended)
        return folder

    def read(self, name: str) -> Any:
        """Return one of these documents: `evaluation`, `examples`, `recommended`, `influence` or `outputs`."""
        path = getattr(self, name)
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
