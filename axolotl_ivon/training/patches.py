"""Everything that is changed on objects other than the Trainer, each with the reason why no override does it.

- `model.save_pretrained`: whoever saves the adapter must save σ with it, and axolotl's last save, its handler of
  SIGINT and the user call the model, not the Trainer. PEFT and FSDP2 give the model classes of their own, so it is
  this one method and not the class that changes.
- `save_pretrained` of the base model, where axolotl has that alone (under DPO, IPO and KTO): its last save and its
  handler of SIGINT would write all weights of the base model, under names that nothing reads, and no σ.
- A state-dict hook on every module with trained weights: whoever reads the model while a draw is in it gets the mean,
  and PEFT, accelerate, DeepSpeed and axolotl all read through `state_dict()`.
- No method of TRL's is changed on its classes or modules: what writes completions is overridden in `rollouts.py`, whose
  first lines name each method with its reason.
- `accelerator.gradient_state.plugin_kwargs`: each backward pass has a draw of its own, so processes must not put off
  averaging to the last of them. The Trainer has this setting in a config that is read before `attach` is called.

Under DeepSpeed and FSDP2, when the optimizer is made:

- The trained weights leave the modules' parameters, and the model gets an anchor (`sharded.py`): what the engine sees
  it shards.
- `accelerator.prepare`: the Trainer has no method of its own between handing the model over and loading a checkpoint.
- DeepSpeed's `engine.load_checkpoint`: it would restore the anchor, and only in as many processes as have saved it.
- DeepSpeed's `zero_force_ds_cpu_optimizer`: it would want an Adam of its own for the anchor where it offloads.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer

from .callback import PosteriorTraining
from .checkpoints import save_with_sigma
from .sharded import ReplicatedAdapter


def average_in_every_backward_pass(trainer: Trainer) -> None:
    """Let processes average their gradients in every backward pass of an accumulation."""
    trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


class SaveWithSigma:
    """`save_pretrained` of the model of a run, which saves σ too. A copy of the model has PEFT's own."""

    run: PosteriorTraining
    save_pretrained: Any

    def __init__(self, run: PosteriorTraining) -> None:
        """Take the place of what the model has, or of what a run before this one on the same adapters had put there."""
        model: Any = run.model
        earlier: Any = model.save_pretrained
        if isinstance(earlier, SaveWithSigma) and set(earlier.run.adapters) <= set(run.adapters):
            earlier = earlier.save_pretrained
        functools.update_wrapper(self, earlier, updated=())
        self.run, self.save_pretrained, self.process = run, earlier, os.getpid()

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the adapters into a folder, as PEFT does, and σ beside them."""
        run, save_pretrained = self.run, self.save_pretrained
        # A worker of the data loader inherits axolotl's handler of SIGINT, and has the weights of when it was forked.
        if os.getpid() != self.process:
            return
        if run.adapter is not None and kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = run.adapter.add_mean(kwargs["state_dict"])
        if run.shows_draws:
            save_pretrained(save_directory, *args, **kwargs)
        elif run.trainer.is_world_process_zero():
            save_with_sigma(run, save_pretrained, Path(save_directory), *args, **kwargs)
        else:
            save_pretrained(save_directory, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = memo.get(id(self.run.model), self.run.model)
        return functools.partial(type(model).save_pretrained, model)


def save_sigma_beside_the_mean(run: PosteriorTraining) -> None:
    """Let the model's `save_pretrained` save σ too."""
    model: Any = run.model
    model.save_pretrained = SaveWithSigma(run)


class SaveAdapters:
    """`save_pretrained` of a base model, which saves the adapters that are in it as their PeftModel does.

    Without them (merged, or taken out) it saves the base model, as that of a copy does.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save into a folder; the options of transformers are for the base model alone."""
        base: Any = self.model.get_base_model()
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            self.model.save_pretrained(str(save_directory))
        else:
            type(base).save_pretrained(base, save_directory, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        base: Any = self.model.get_base_model()
        base = memo.get(id(base), base)
        return functools.partial(type(base).save_pretrained, base)


def save_the_adapter_of(run: PosteriorTraining) -> None:
    """Let the base model's `save_pretrained` save the adapters of a run, and σ beside them."""
    base: Any = run.model.get_base_model()
    base.save_pretrained = SaveAdapters(run.model)


def show_the_mean(run: PosteriorTraining) -> None:
    """Let `state_dict()` of the model have the mean while a draw is in the parameters, and where they are taken out."""

    def put_mean(
        name: str, weight: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        if module is not owners[name]:  # of a copy of the model, which has weights of its own
            return
        key, param, optimizer = prefix + name.rpartition(".")[2], run.params[weight], run.optimizer
        taken_out = run.adapter is not None and run.adapter.prepared
        if run.shows_draws:
            return
        if taken_out or (optimizer is not None and optimizer.sampling and key in state_dict):
            state_dict[key] = optimizer.mean(param).to(param.dtype)

    owners = {name: run.model.get_submodule(name.rpartition(".")[0]) for name in run.names}
    for name, weight in run.names.items():
        owners[name].register_state_dict_post_hook(functools.partial(put_mean, name, weight))


def keep_engine_off_the_adapter(trainer: Trainer, adapter: ReplicatedAdapter) -> None:
    """Notice when the engine has taken the model over, and take away how DeepSpeed would load the anchor."""
    accelerator: Any = trainer.accelerator
    prepare = accelerator.prepare
    if trainer.is_deepspeed_enabled:
        accelerator.state.deepspeed_plugin.hf_ds_config.config["zero_force_ds_cpu_optimizer"] = False

    @functools.wraps(prepare)
    def and_take_loading_away(*args: Any, **kwargs: Any) -> Any:
        result = prepare(*args, **kwargs)
        adapter.prepared = True
        if trainer.is_deepspeed_enabled:
            engine = accelerator.deepspeed_engine_wrapped.engine
            engine.load_checkpoint = lambda folder, *args, **kwargs: (folder, {})
        return result

    accelerator.prepare = and_take_loading_away
