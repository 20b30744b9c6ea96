"""What `ivon-post generate` writes: a line of outputs for each prompt, and the settings beside the file."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from .base import Record, Tau
from .ensemble import EnsembleSource


class OutputRecord(Record):
    """One output: its text, the draw that it is from, and its log-probability if it is known."""

    text: str
    member: int = 0
    logprob: float | None = None


class NBestRecord(Record):
    """The outputs for one prompt, member by member, and how sure they are (`uncertainty.Uncertainty`)."""

    written_by: ClassVar[str] = "ivon-post generate"

    prompt: str = ""
    reference: str | None = None
    confidence: float | None = None
    semantic_entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    abstain: bool | None = None
    outputs: Annotated[list[OutputRecord], Field(min_length=1)]


class NBestSettings(Record):
    """FILE.settings.json: what the outputs of FILE were made with. A run goes on with the same settings alone."""

    written_by: ClassVar[str] = "ivon-post generate"

    ensemble: EnsembleSource | None = None  # with an endpoint
    adapter: str | None = None  # the fingerprint (`mean_sha256`) of its mean
    unpruned_sha256: str | None = None  # and that of the adapter that it was pruned from
    tau: Tau = 1.0
    prune_ratio: float = 0.0

    @property
    def source(self) -> dict[str, Any]:
        """What the outputs were drawn from: `tau`, `ratio`, `mean_sha256` and `unpruned_sha256`, as far as known."""
        if self.ensemble:
            return {"tau": self.ensemble.tau, "ratio": self.ensemble.pruned_ratio, "mean_sha256": None}
        known = {"unpruned_sha256": self.unpruned_sha256} if self.unpruned_sha256 else {}
        return {"tau": self.tau, "ratio": self.prune_ratio, "mean_sha256": self.adapter, **known}
