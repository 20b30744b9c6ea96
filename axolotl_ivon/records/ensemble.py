"""ensemble.json, which `ivon-post sample` writes, and `generate` and `serve` read with an endpoint."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from .base import Record, Share, Tau


def _of_a_folder(name: str) -> str:
    if name in ("", ".", "..") or "/" in name:
        raise ValueError("it must be the name of a folder")
    return name


class EnsembleSource(Record):
    """The posterior that members were drawn from, and how."""

    source: str = ""  # the adapter: the absolute path of its folder, or a Hub id
    seed: int = 0
    tau: Tau = 1.0
    pruned_ratio: Share = 0.0
    generation_prompt: str = ""  # what training wrote before its answers; empty where that is unknown
    chat_template_kwargs: str = ""  # arguments of the chat template in training, as JSON
    system_prompt: str = ""  # what the system turn of all training data said; empty where there was none
    choices: str = ""  # the answers of the training data, as a JSON list; empty if they were more than a few labels


class EnsembleRecord(EnsembleSource):
    """The posterior, and the folders of the adapters that were drawn from it."""

    written_by: ClassVar[str] = "ivon-post sample"

    members: Annotated[list[Annotated[str, AfterValidator(_of_a_folder)]], Field(min_length=1)]
