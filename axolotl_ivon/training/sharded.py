"""The adapter under DeepSpeed and FSDP2: a replica in every process, while they shard the base model.

Both own what they shard: DeepSpeed steps inside the backward pass on flat pieces of its own, FSDP2 replaces the
parameters by their shards. IVON needs every weight twice in a step, to draw it and to update it. The adapter is small
beside the base model, so it is taken out of the modules' parameters before the model is handed over: each process
holds all of it, draws the same noise, and averages the gradients itself. What is left for the engine to optimize is
an anchor, one parameter that nothing reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from ..errors import IVONError
from ..storage.atomic import new_file
from .saved import names_of

ANCHOR = "ivon_anchor"
STATE_FILE = "ivon_state.safetensors"
_STATE_FORMAT = {"format": "ivon-state", "format_version": "1"}


class ReplicatedAdapter(TrainerCallback):
    """The trained weights of a model that is about to be sharded, and what keeps them alike in all processes.

    `params`, by their names in the model, are taken out of it: `self.params` has the same names and tensors that are
    complete, on the Trainer's device, and equal to those of the first process.
    """

    def __init__(self, trainer: Trainer, model: PeftModel, params: Mapping[str, nn.Parameter]) -> None:
        self.trainer: Any = trainer  # whose accelerator has not prepared the model yet
        self.model: Any = model
        self.prepared = False  # whether the engine has taken the model over
        self.optimizer: Any = None
        self.gradient_norm: Tensor | None = None  # of the last step; the Trainer's own is that of the anchor
        self.params: dict[str, nn.Parameter] = {}
        self.names = names_of(model, params)
        device = trainer.accelerator.device
        for name, param in params.items():
            self.params[name] = nn.Parameter(_copy_from_first_process(param, device))
        for name, weight in self.names.items():
            owner, attribute = self._owner(name)
            del owner._parameters[attribute]
            owner.__dict__[attribute] = self.params[weight]
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        anchor = torch.zeros(1, dtype=dtype, device=device)
        model.register_parameter(ANCHOR, nn.Parameter(anchor))
        # ZeRO 1 and 2 fail on a step in which nothing that they own has a gradient.
        self.engine_wants_gradient = trainer.is_deepspeed_enabled and (
            trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config["zero_optimization"]["stage"] < 3
        )
        trainer.add_callback(self)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        owner, _, attribute = name.rpartition(".")
        return self.model.get_submodule(owner), attribute

    @property
    def anchor(self) -> Tensor:
        """The parameter that the engine optimizes."""
        return self.model.get_parameter(ANCHOR)

    def anchor_optimizer(self, optimizer: Any) -> Optimizer:
        """Return the anchor's optimizer, for the Trainer; where that one steps, `optimizer` steps."""
        self.optimizer = optimizer
        # With momentum, since FSDP2 cannot load the state of an optimizer that has none.
        return torch.optim.SGD([self.anchor], lr=optimizer.param_groups[0]["lr"], momentum=0.9)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.optimizer.param_groups[0]["lr"]
        gradients = [param.grad for param in self.params.values() if param.grad is not None]
        self.gradient_norm = get_total_norm(gradients)
        self.optimizer.step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.zero_grad()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the weights back where whoever saves the model looks for them; ZeRO-3 knows no weights but its own."""
        if not self.trainer.is_deepspeed_enabled:
            for name, weight in self.names.items():
                owner, attribute = self._owner(name)
                owner.__dict__.pop(attribute, None)
                owner._parameters[attribute] = self.params[weight]

    def add_mean(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state dict that an engine has gathered, with the mean of the adapter's weights."""
        means = {weight: self.optimizer.mean(p).to(p.dtype) for weight, p in self.params.items()}
        return {**state_dict, **{name: means[weight] for name, weight in self.names.items()}}

    def save_state(self, path: Path) -> None:
        """Write the optimizer's state, float32, by the names of the weights.

        Raises:
            IVONError: the file cannot be written.
        """
        saved = self.optimizer.state_dict()
        names = list(self.params)
        tensors = {
            f"{names[index]}/{key}": value.detach().cpu().contiguous()
            for index, values in saved["state"].items()
            for key, value in values.items()
        }
        draws = str(saved["param_groups"][0]["draws"])
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata={**_STATE_FORMAT, "draws": draws})

    def load_state(self, path: Path) -> None:
        """Take over what `save_state` has written, in any number of processes.

        Raises:
            IVONError: the file is missing, or is not the state of these weights.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (FileNotFoundError, SafetensorError) as error:
            raise IVONError(
                f"{path} is missing or damaged: a run under DeepSpeed or FSDP resumes from a checkpoint of such a run"
            ) from error
        if {key: header.get(key) for key in _STATE_FORMAT} != _STATE_FORMAT:
            format, version = header.get("format"), header.get("format_version")
            raise IVONError(f"{path} has format {format} {version}, not ivon-state 1")
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.params):
            state[index] = {key[len(name) + 1 :]: loaded[key] for key in loaded if key.startswith(f"{name}/")}
            if not state[index]:
                raise IVONError(f"{path} has no state of {name}: the adapter was another one")
        current = self.optimizer.state_dict()
        groups = [{**group, "draws": int(header["draws"])} for group in current["param_groups"]]
        try:
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise IVONError(f"{path} does not fit the adapter: {error}") from error


@contextmanager
def gathered(params: Sequence[nn.Parameter], written: bool = False) -> Iterator[None]:
    """Let weights that ZeRO-3 has partitioned be whole inside; what the first process has `written` stays."""
    partitioned = [param for param in params if hasattr(param, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(partitioned, modifier_rank=0 if written else None):
        yield


def _copy_from_first_process(param: nn.Parameter, device: torch.device) -> Tensor:
    """Return a whole copy of a weight, as the first process has it."""
    if param.is_meta:
        value = torch.zeros(param.shape, dtype=param.dtype, device=device)
    else:
        with gathered([param]):
            value = param.detach().to(device, copy=True)
    if dist.is_initialized():
        dist.broadcast(value, src=0)
    return value
