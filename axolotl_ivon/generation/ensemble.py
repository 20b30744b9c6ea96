"""An ensemble's folder, and the command line that serves its members with vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..errors import IVONError, param_ref
from ..records.ensemble import EnsembleRecord
from ..storage.atomic import new_file
from ..storage.format import CONFIG_FILE, ENSEMBLE_FILE, base_model_folder, read_json
from .plan import Plan

SERVE_FILE = "serve.sh"
# The values of --max-lora-rank that vLLM takes.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Ensemble:
    """An ensemble's folder, as `ivon-post sample` writes it.

    Attributes:
        facts: ensemble.json without the members: source, seed, tau, pruned_ratio.
        base_model: the base model: the absolute path of its folder, or a Hub id.
        tokenizer_folder: the folder of the adapter that it was drawn from, which may be gone.

    Raises:
        IVONError: the folder is no ensemble, or names no base model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ENSEMBLE_FILE).is_file():
            raise IVONError(f"{folder} is no ensemble; give the folder that `ivon-post sample --serve vllm` wrote")
        path = self.folder / ENSEMBLE_FILE
        self.facts = EnsembleRecord.parse(read_json(path), str(path)).dump()
        self._members: list[str] = self.facts.pop("members")
        self.config = read_json(self.folder / self._members[0] / CONFIG_FILE)
        name = str(self.config.get("base_model_name_or_path") or "")
        if not name:
            raise IVONError(f"{self.folder / self._members[0] / CONFIG_FILE} names no base model")
        self.base_model = str(base_model_folder(name, self.folder / self._members[0]) or name)
        self.tokenizer_folder = str(self.facts.get("source", ""))

    @property
    def draws(self) -> list[str]:
        """The names of the members that are draws."""
        return [name for name in self._members if name != "mean"]

    @property
    def has_mean(self) -> bool:
        """Whether the mean is a member too."""
        return "mean" in self._members

    def members(self, plan: Plan) -> list[str]:
        """Return the names of the members that `plan` needs.

        Raises:
            IVONError: the ensemble has fewer, or no mean.
        """
        if plan.mean:
            if "mean" not in self._members:
                raise IVONError(
                    f"{param_ref('mean')}: {self.folder} has no mean; draw it with `ivon-post sample --include-mean`"
                )
            return ["mean"]
        draws = self.draws
        if len(draws) < plan.members:
            n = param_ref("n")
            raise IVONError(
                f"{n} {plan.n} takes {plan.members} draws of {plan.per_model} outputs; {self.folder} has {len(draws)}: "
                f"say {n} {len(draws) * plan.per_model}, or draw more with `ivon-post sample -n {plan.members}`"
            )
        return draws[: plan.members]

    def serve_command(self) -> str:
        """Return the command line that serves every member with vLLM, under its name; paths are absolute.

        Raises:
            IVONError: vLLM cannot serve such adapters.
        """
        modules = [f"{name}={(self.folder / name).resolve()}" for name in self._members]
        words = ["vllm", "serve", self.base_model, "--enable-lora"]
        words += ["--max-lora-rank", str(served_rank(self.config)), "--max-loras", str(len(modules))]
        # Else a request inherits the base model's generation_config.json, penalties included.
        words += ["--generation-config", "vllm", "--lora-modules", *modules]
        return shlex.join(words)

    def write_serve_script(self) -> Path:
        """Write the command line into the folder, as a script that passes its own arguments on, and return its path."""
        path = self.folder / SERVE_FILE
        with new_file(path) as temporary:
            temporary.write_text(f'#!/bin/sh\nexec {self.serve_command()} "$@"\n', encoding="utf-8")
            temporary.chmod(0o755)
        return path


def served_rank(config: dict[str, Any]) -> int:
    """Return the --max-lora-rank with which vLLM serves adapters of this adapter_config.json.

    Raises:
        IVONError: vLLM cannot serve such adapters, or no base model is named.
    """
    if not config.get("base_model_name_or_path"):
        raise IVONError(f"{param_ref('serve')} vllm: adapter_config.json names no base model; write its name there")
    for key in ("use_dora", "modules_to_save", "lora_bias"):
        if config.get(key):
            raise IVONError(
                f"{param_ref('serve')} vllm: vLLM serves no adapters with {key}; `ivon-post merge` gives whole models"
            )
    if config.get("bias", "none") != "none":
        raise IVONError(f"{param_ref('serve')} vllm: vLLM serves no adapters with bias {config['bias']!r}")
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    for size in _RANKS:
        if rank <= size:
            return size
    raise IVONError(f"{param_ref('serve')} vllm: vLLM serves adapters up to rank {_RANKS[-1]}; this one has {rank}")
