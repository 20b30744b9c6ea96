"""The adapter under DeepSpeed and FSDP2: whole in every process, while they shard the base model.

Both own what they shard: DeepSpeed steps inside the backward pass on flat pieces of its own, FSDP2 replaces the
parameters by their shards. IVON needs every weight twice in a step, to draw it and to update it. The adapter is small
beside the base model, so it is taken out of the modules' parameters before the model is handed over: each process
holds all of it, draws the same noise, and averages the gradients itself. What is left for the engine to optimize is
an anchor, one parameter that nothing reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import TrainerCallback

from ..errors import IVONError
from ..storage.atomic import new_file

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer

ANCHOR = "ivon_anchor"
STATE_FILE = "ivon_state.safetensors"
_STATE_FORMAT = {"format": "ivon-state", "format_version": "1"}


class WholeAdapter(TrainerCallback):
    """The trained weights of a model that is about to be sharded, and what keeps them alike in all processes.

    Args:
        trainer: the Trainer; its accelerator has not prepared the model yet.
        model: the model.
        params: the trained parameters, by their names in the model. They are taken out of it: `self.params` has the
            same names and tensors that are whole, on the Trainer's device, and equal to those of the first process.
    """

    def __init__(self, trainer: Trainer, model: PeftModel, params: Mapping[str, nn.Parameter]) -> None:
        self.trainer: Any = trainer
        self.model: Any = model
        self.prepared = False
        self.optimizer: Any = None
        self.gradient_norm: Tensor | None = None  # of the step before, which the Trainer takes from the model
        self.params: dict[str, nn.Parameter] = {}
        device = trainer.accelerator.device
        for name, param in params.items():
            owner, attribute = self.place(name)
            self.params[name] = nn.Parameter(_whole(param, device))
            del owner._parameters[attribute]
            owner.__dict__[attribute] = self.params[name]
        dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
        anchor = torch.zeros(1, dtype=dtypes[0] if dtypes else torch.float32, device=device)
        model.register_parameter(ANCHOR, nn.Parameter(anchor))

    def place(self, name: str) -> tuple[nn.Module, str]:
        owner, _, attribute = name.rpartition(".")
        return self.model.get_submodule(owner), attribute

    def take_over(self, optimizer: Any) -> Optimizer:
        """Step and save `optimizer` when the Trainer steps and saves what it gets instead: the anchor's optimizer."""
        self.optimizer = optimizer
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            # DeepSpeed would want an Adam of its own where it offloads the optimizer's state; the anchor has none.
            config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
            config["zero_force_ds_cpu_optimizer"] = False
            if config["zero_optimization"]["stage"] < 3:
                trainer.compute_loss = self.around_loss(trainer.compute_loss)  # type: ignore[method-assign]
        trainer.accelerator.prepare = self.around_prepare(trainer.accelerator.prepare)
        trainer._save_optimizer_and_scheduler = self.around_save(trainer._save_optimizer_and_scheduler)
        trainer._load_optimizer_and_scheduler = self.around_load(trainer._load_optimizer_and_scheduler)
        # The base model is frozen, and the adapter's weights come with the state; torch 2.14 fails on weights in a
        # checkpoint of FSDP2 that the model, from which they are taken, does not have.
        trainer._load_from_checkpoint = lambda *args, **kwargs: None
        trainer._load_best_model = self.load_best
        trainer.save_model = self.around_save_model(trainer.save_model)  # type: ignore[method-assign]
        trainer.add_callback(self)
        # With momentum, since FSDP2 cannot load the state of an optimizer that has none.
        return torch.optim.SGD([self.model.get_parameter(ANCHOR)], lr=optimizer.param_groups[0]["lr"], momentum=0.9)

    # What happens in a step

    def around_loss(self, compute_loss: Any) -> Any:
        @functools.wraps(compute_loss)
        def with_anchor(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            loss, *rest = result if isinstance(result, tuple) else (result,)
            # ZeRO 1 and 2 fail on a step in which nothing that they own has a gradient.
            loss = loss + 0 * self.model.get_parameter(ANCHOR).sum()
            return (loss, *rest) if rest else loss

        return with_anchor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.optimizer.param_groups[0]["lr"]
        gradients = [param.grad for param in self.params.values() if param.grad is not None]
        self.gradient_norm = get_total_norm(gradients)
        self.optimizer.step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.zero_grad()

    # What the engine must not do

    def around_prepare(self, prepare: Any) -> Any:
        @functools.wraps(prepare)
        def then_take_loading_away(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            self.prepared = True
            if self.trainer.is_deepspeed_enabled:
                # It would restore the anchor, and only in as many processes as have saved it.
                wrapper = self.trainer.accelerator.deepspeed_engine_wrapped
                wrapper.engine.load_checkpoint = lambda folder, *args, **kwargs: (folder, {})
            return result

        return then_take_loading_away

    # What is saved

    def around_save_model(self, save_model: Any) -> Any:
        @functools.wraps(save_model)
        def whole(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            save_model(output_dir, *args, **kwargs)
            # A sharded state dict leaves the adapter's own file out.
            plugin = self.trainer.accelerator.state.fsdp_plugin if self.trainer.is_fsdp_enabled else None
            if plugin is not None and "FULL" not in str(plugin.state_dict_type) and self.trainer.args.should_save:
                self.model.save_pretrained(output_dir or self.trainer.args.output_dir, state_dict={})

        return whole

    def complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict that an engine has gathered, with the mean of the adapter's weights."""
        return {**state_dict, **{name: self.optimizer.mean(p).to(p.dtype) for name, p in self.params.items()}}

    def around_save(self, save: Any) -> Any:
        @functools.wraps(save)
        def with_state(output_dir: str) -> None:
            save(output_dir)
            if self.trainer.args.should_save:
                self.save_state(Path(output_dir) / STATE_FILE)

        return with_state

    def around_load(self, load: Any) -> Any:
        @functools.wraps(load)
        def with_state(checkpoint: str | None) -> None:
            load(checkpoint)
            if checkpoint is not None:
                self.load_state(Path(checkpoint) / STATE_FILE)
                # DeepSpeed keeps the learning rate with what it was kept from loading.
                for group, lr in zip(
                    self.trainer.optimizer.param_groups, self.trainer.lr_scheduler.get_last_lr(), strict=True
                ):
                    group["lr"] = lr

        return with_state

    def load_best(self) -> None:
        """Put the mean of the best checkpoint into the model, as the Trainer's `load_best_model_at_end` asks."""
        best = self.trainer.state.best_model_checkpoint
        if best is not None:
            self.load_state(Path(best) / STATE_FILE)

    def save_state(self, path: Path) -> None:
        """Write the optimizer's state, float32, by the names of the weights.

        Raises:
            IVONError: the file cannot be written.
        """
        saved = self.optimizer.state_dict()
        names = list(self.params)
        tensors = {
            f"{name}/{key}": value.detach().cpu().contiguous()
            for index, values in saved["state"].items()
            for name in [names[index]]
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
                facts = file.metadata() or {}
                loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (FileNotFoundError, SafetensorError) as error:
            raise IVONError(
                f"{path} is missing or damaged: a run under DeepSpeed or FSDP resumes from a checkpoint of such a run"
            ) from error
        if {key: facts.get(key) for key in _STATE_FORMAT} != _STATE_FORMAT:
            raise IVONError(f"{path} has format {facts.get('format')} {facts.get('format_version')}, not ivon-state 1")
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.params):
            prefix = f"{name}/"
            state[index] = {key.removeprefix(prefix): loaded[key] for key in loaded if key.startswith(prefix)}
            if not state[index]:
                raise IVONError(f"{path} has no state of {name}: the adapter was another one")
        current = self.optimizer.state_dict()
        groups = [{**group, "draws": int(facts["draws"])} for group in current["param_groups"]]
        try:
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise IVONError(f"{path} does not fit the adapter: {error}") from error
        with torch.no_grad():
            for param in self.params.values():
                param.copy_(self.optimizer.mean(param))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the weights back where whoever saves the model looks for them; ZeRO-3 knows no weights but its own."""
        if not self.trainer.is_deepspeed_enabled:
            for name, param in self.params.items():
                owner, attribute = self.place(name)
                owner.__dict__.pop(attribute, None)
                owner._parameters[attribute] = param


def _whole(param: nn.Parameter, device: torch.device) -> Tensor:
    """Return a copy of a weight as the first process has it."""
    if hasattr(param, "ds_id"):  # ZeRO-3 has partitioned it already
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([param]):
            value = param.detach().to(device, copy=True)
    elif param.is_meta:
        value = torch.zeros(param.shape, dtype=param.dtype, device=device)
    else:
        value = param.detach().to(device, copy=True)
    if dist.is_initialized():
        dist.broadcast(value, src=0)
    return value
