"""An ensemble's folder, and the command line that serves its members with vLLM."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import IVONError, param_ref
from ..posterior.adapter import changes_base
from ..records.ensemble import EnsembleRecord
from ..storage.atomic import new_file
from ..storage.format import CONFIG_FILE, ENSEMBLE_FILE, base_model_folder, read_json
from .plan import Plan

SERVE_FILE = "serve.sh"
# The values of --max-lora-rank that vLLM takes.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What vLLM refuses to load, or leaves out and so answers as another model: the keys of adapter_config.json,
_UNSERVED = (
    *("use_dora", "modules_to_save", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
)
# what `changes_base`, where vLLM serves the base model as it was, and all tensors but these.
_SERVED_TENSOR = re.compile(r"\.lora_(A|B)\.weight$|\.lora_embedding_(A|B)$|\.base_layer\.weight$")


class Ensemble:
    """An ensemble's folder, as `ivon-post sample` writes it; another, or one without a base model, is an IVONError."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / ENSEMBLE_FILE
        if not path.is_file():
            raise IVONError(f"{folder} is no ensemble; give the folder that `ivon-post sample --serve vllm` wrote")
        self.source = EnsembleRecord.parse(read_json(path), str(path)).dump()  # ensemble.json without the members
        self._members: list[str] = self.source.pop("members")
        self.draws = [name for name in self._members if name != "mean"]  # the names of those that are draws
        self.has_mean = "mean" in self._members
        first = self.folder / self._members[0]
        self._config = read_json(first / CONFIG_FILE)
        if not (name := str(self._config.get("base_model_name_or_path") or "")):
            raise IVONError(f"{first / CONFIG_FILE} names no base model")
        self.base_model = str(base_model_folder(name, first) or name)  # an absolute path, or a Hub id
        self.tokenizer_folder = str(self.source.get("source", ""))  # of the adapter drawn from, which may be gone

    def members(self, plan: Plan) -> list[str]:
        """Return the names of the members that `plan` needs; raise IVONError if the ensemble has fewer, or no mean."""
        if plan.mean and not self.has_mean:
            raise IVONError(
                f"{param_ref('mean')}: {self.folder} has no mean; draw it with `ivon-post sample --include-mean`"
            )
        if plan.mean:
            return ["mean"]
        if (count := len(self.draws)) < plan.members:
            n = param_ref("n")
            raise IVONError(
                f"{n} {plan.n} takes {plan.members} draws of {plan.per_model} outputs; {self.folder} has {count}: "
                f"say {n} {count * plan.per_model}, or draw more with `ivon-post sample -n {plan.members}`"
            )
        return self.draws[: plan.members]

    def first(self, samples: int | None) -> list[str]:
        """Return the names of the first draws, or of all; raise IVONError if there are fewer."""
        return self.draws if samples is None else self.members(Plan(n=samples, per_model=1))

    def serve_command(self) -> str:
        """Return the command line that serves every member with vLLM, under its name; paths are absolute."""
        modules = [f"{name}={(self.folder / name).resolve()}" for name in self._members]
        words = ["vllm", "serve", self.base_model, "--enable-lora"]
        words += ["--max-lora-rank", str(served_rank(self._config)), "--max-loras", str(len(modules))]
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


def served_rank(config: dict[str, Any], tensors: Iterable[str] = ()) -> int:
    """Return the --max-lora-rank with which vLLM serves adapters of this adapter_config.json, and of these tensors.

    Raises IVONError if vLLM cannot serve them as PEFT does, or no base model is named.
    """
    vllm = f"{param_ref('serve')} vllm: vLLM serves"
    if not config.get("base_model_name_or_path"):
        raise IVONError(f"{param_ref('serve')} vllm: adapter_config.json names no base model; write its name there")
    unserved = [key for key in _UNSERVED if config.get(key)]
    if config.get("bias", "none") != "none":
        unserved.append(f"bias {config['bias']!r}")
    if changes_base(config):
        unserved.append(f"init_lora_weights {config['init_lora_weights']!r}, which changes the base model")
    unserved += [f"the tensor {key}" for key in tensors if not _SERVED_TENSOR.search(key)]
    if unserved:
        raise IVONError(f"{vllm} no adapters with {unserved[0]}; `ivon-post merge` gives whole models")
    if patterns := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
        raise IVONError(
            f"{vllm} one rank and scaling, and leaves out {patterns[0]}; draw with `ivon-post sample --serve vllm`"
        )
    rank = config.get("r", 0)
    if rank <= _RANKS[-1]:
        return next(size for size in _RANKS if rank <= size)
    raise IVONError(f"{vllm} adapters up to rank {_RANKS[-1]}; this one has {rank}")
