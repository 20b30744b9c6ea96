"""What stands between a Trainer, its model and the optimizer while a posterior is trained."""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ..errors import IVONError
from ..optim.ivon import IVONLoRA, Skipped
from ..plugins import plugin_manager
from ..posterior.adapter import save_sigma
from ..posterior.posterior import Posterior
from ..storage.atomic import updated_adapter
from ..storage.format import MEAN_FILE, SIGMA_FILE
from ..storage.tensorfile import TensorFile
from .checkpoints import no_step_past_the_end, whole_checkpoints
from .posterior_loss import posterior_loss
from .presets import rate_for, rates
from .processes import agree_on_gradients, average, check_sharding, is_sharded
from .sharded import WholeAdapter

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

LOG = logging.getLogger(__name__)

# A weight can travel at most Σ α_t·ξ in a run. The paper's commonsense runs allow 0.13; a run that allowed 0.04
# learned nothing.
SHORT_REACH, PAPER_REACH = 0.08, 0.13
ADAM_LIKE_LR = 1e-3
# So many skipped steps in a row are no accident of one batch, nor of a loss scaler that finds its scale.
DIVERGED = 10


class PosteriorTraining(TrainerCallback):
    """Stands between a Trainer, its model and the optimizer."""

    def __init__(
        self, trainer: Trainer, settings: dict[str, Any], facts: dict[str, str], eval_samples: int, per_rank: bool
    ) -> None:
        self.trainer, self.settings, self.facts, self.eval_samples = trainer, settings, facts, eval_samples
        self.per_rank = per_rank and trainer.args.world_size > 1
        self.optimizer: Any = None
        self.best_folder: str | None = None
        self.begun = False
        self.skipped = Skipped(0, 0, None)
        self.model = peft_model(trainer)
        self.names = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        _check_trained_parameters(self.model, list(self.names))
        check_sharding(trainer)
        self.adapter: WholeAdapter | None = None  # under DeepSpeed and FSDP
        # An optimizer that is made here only to be refused here, before a model is trained for hours.
        try:
            IVONLoRA([nn.Parameter(torch.zeros(1))], **settings)
        except ValueError as error:
            raise IVONError(str(error)) from error

        # Every draw has a gradient of its own, so processes must not put off synchronizing to the last of them.
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        trainer.create_optimizer = self.create_optimizer  # type: ignore[method-assign]
        trainer.training_step = self.around_training_step(trainer.training_step)  # type: ignore[method-assign]
        trainer.log = self.around_log(trainer.log)  # type: ignore[method-assign]
        if eval_samples:
            trainer.evaluation_loop = self.around_evaluation(trainer.evaluation_loop)  # type: ignore[method-assign]
        self.model.save_pretrained = self.around_save(self.model.save_pretrained)  # type: ignore[method-assign]
        whole_checkpoints(trainer)
        no_step_past_the_end(trainer)
        for name in self.names:
            owner, _, attribute = name.rpartition(".")
            hook = functools.partial(self.put_mean_into_state_dict, attribute, name)
            self.model.get_submodule(owner).register_state_dict_post_hook(hook)

    # What the Trainer calls

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.trainer.optimizer is None:
            self.names = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            if is_sharded(self.trainer):
                self.adapter = WholeAdapter(self.trainer, self.model, self.names)
                self.names = self.adapter.params
            named = list(self.names.items())
            self.optimizer = plugin_manager().hook.create_optimizer(named_parameters=named, settings=self.settings)
            for group in self.optimizer.param_groups:
                group.setdefault("weight_decay", 0.0)  # axolotl 0.21 reads it from every optimizer
            if self.per_rank:
                self.optimizer.process = self.trainer.args.process_index
            self.trainer.optimizer = self.adapter.take_over(self.optimizer) if self.adapter else self.optimizer
        return self.trainer.optimizer

    def around_create_scheduler(self, create_scheduler: Any, travel: float) -> Any:
        @functools.wraps(create_scheduler)
        def at_the_rate_for_the_travel(num_training_steps: int, optimizer: Any = None) -> Any:
            trainer: Any = self.trainer

            def schedule(lr: float, probe: Any) -> Any:
                trainer.args.learning_rate, trainer.lr_scheduler = lr, None
                return create_scheduler(num_training_steps, probe)

            lr = rate_for(travel, self.settings["clip"], num_training_steps, schedule)
            trainer.args.learning_rate, trainer.lr_scheduler = lr, None
            chosen = optimizer or trainer.optimizer
            for group in chosen.param_groups:
                group["lr"] = group["initial_lr"] = lr
            getattr(chosen, "defaults", {})["lr"] = lr  # where some schedules look
            if trainer.is_world_process_zero():
                LOG.warning("the preset takes learning_rate %.3g for these %d steps", lr, num_training_steps)
            return create_scheduler(num_training_steps, optimizer)

        return at_the_rate_for_the_travel

    def around_training_step(self, training_step: Any) -> Any:
        @functools.wraps(training_step)
        def at_a_draw(*args: Any, **kwargs: Any) -> Tensor:
            context = plugin_manager().hook.sampling_context(trainer=self.trainer, optimizer=self.optimizer)
            model: Any = kwargs.get("model", args[0] if args else None)
            by_itself = self.per_rank and isinstance(model, DistributedDataParallel)
            with context, model.no_sync() if by_itself else nullcontext():
                loss = training_step(*args, **kwargs)
                if self.adapter is not None and not self.per_rank:
                    average(agree_on_gradients(list(self.names.values())))
                return loss

        return at_a_draw

    def around_log(self, log: Any) -> Any:
        @functools.wraps(log)
        def with_posterior(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self.optimizer is not None:
                hook = plugin_manager().hook.log_metrics
                for metrics in reversed(hook(trainer=self.trainer, optimizer=self.optimizer)):
                    logs.update(metrics)
                if "grad_norm" in logs and self.adapter is not None and self.adapter.gradient_norm is not None:
                    logs["grad_norm"] = float(self.adapter.gradient_norm)
            log(logs, *args, **kwargs)

        return with_posterior

    def around_evaluation(self, evaluation_loop: Any) -> Any:
        @functools.wraps(evaluation_loop)
        def with_draws(dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            output = evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.optimizer is not None:
                loss = posterior_loss(self.trainer, self.optimizer, dataloader, self.eval_samples)
                output.metrics[f"{metric_key_prefix}_loss_posterior"] = loss
            return output

        return with_draws

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.best_folder = None
        self.begun = True  # before, the optimizer may not have the state that it resumes from
        if not state.is_world_process_zero:
            return
        lr, clip = args.learning_rate, self.settings["clip"]
        scheduler: Any = kwargs.get("lr_scheduler")
        # The rates of others, one_cycle's say, begin elsewhere than at their peak.
        if hasattr(scheduler, "lr_lambdas") and not math.isclose(lr, scheduler.base_lrs[0]):
            LOG.warning("the checkpoint goes on at its learning_rate %.3g, not at %.3g", scheduler.base_lrs[0], lr)
            lr = scheduler.base_lrs[0]
        if args.max_grad_norm:
            LOG.warning(
                "max_grad_norm %g scales the gradients and with them the Hessian estimate, which widens the posterior; "
                "clip already bounds the step: set max_grad_norm to 0",
                args.max_grad_norm,
            )
        if lr < ADAM_LIKE_LR:
            LOG.warning(
                "learning_rate %g looks like one for Adam: IVON's step is a natural-gradient step bounded by "
                "clip, and 1e-2 to 1e-1 is the usual range",
                lr,
            )
        reach = sum(rates(scheduler, lr, state.max_steps)) * clip
        if reach < SHORT_REACH:
            LOG.warning(
                "in this run no weight can travel farther than %.3g (the sum of learning rate × clip over %d steps), "
                "and below %g it may learn little: raise learning_rate%s or clip, or train longer",
                reach,
                state.max_steps,
                SHORT_REACH,
                f" (with {lr * PAPER_REACH / reach:.2g} it is {PAPER_REACH}, as in the paper)" if reach else "",
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.per_rank:
            agree_on_gradients(list(self.names.values()))
            self.optimizer.synchronize(average)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # To ask a device is to wait for it, so then only when the Trainer waits anyway.
        if control.should_log or all(param.device.type == "cpu" for param in self.names.values()):
            self.tell_of_skipped_steps(state.global_step)

    def tell_of_skipped_steps(self, step: int) -> None:
        before, skipped = self.skipped, getattr(self.optimizer, "skipped", None)
        if skipped is None or skipped == before:
            return
        self.skipped = skipped
        if skipped.in_a_row >= DIVERGED > before.in_a_row:
            LOG.error(
                "the run diverges: the last %d steps were skipped, since the gradient of %s is not finite; m and σ are "
                "those of step %d: go on from a checkpoint with a smaller learning_rate",
                skipped.in_a_row,
                skipped.tensor,
                step - skipped.in_a_row,
            )
        elif 0 < skipped.in_a_row < DIVERGED or skipped.total > before.total + skipped.in_a_row:
            number = skipped.total - before.total
            steps = f"step {step} was" if number == 1 and skipped.in_a_row else f"{number} steps up to step {step} were"
            LOG.warning("%s skipped: the gradient of %s is not finite", steps, skipped.tensor)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end:
            self.best_folder = state.best_model_checkpoint

    # What is saved

    def put_mean_into_state_dict(
        self,
        attribute: str,
        name: str,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
    ) -> None:
        """Whoever reads the model while a draw is in it (a signal handler, a checkpoint) gets the mean."""
        key, param = prefix + attribute, self.names[name]
        taken_out = self.adapter is not None and self.adapter.prepared
        if taken_out or (self.optimizer is not None and self.optimizer.sampling and key in state_dict):
            state_dict[key] = self.optimizer.mean(param).to(param.dtype)

    def around_save(self, save_pretrained: Any) -> Any:
        @functools.wraps(save_pretrained)
        def with_sigma(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
            if self.adapter is not None and kwargs.get("state_dict") is not None:
                kwargs["state_dict"] = self.adapter.complete(kwargs["state_dict"])
            if not self.trainer.is_world_process_zero():
                save_pretrained(save_directory, *args, **kwargs)
                return
            target = Path(save_directory)
            if not self.begun and (target / SIGMA_FILE).is_file():
                LOG.warning("%s holds a posterior and this run has not begun to train: left as it is", target)
                return
            saved = []
            with updated_adapter(target) as new:
                if (target / "README.md").is_file():
                    shutil.copyfile(target / "README.md", new / "README.md")  # PEFT goes on with what it finds
                save_pretrained(new, *args, **kwargs)
                for adapter in self.model.peft_config if self.begun else ():
                    name = "" if adapter == "default" else adapter
                    if (new / name / MEAN_FILE).is_file():
                        self.save_sigma(new / name, adapter)
                        saved.append(target / name)
            for folder in saved:
                plugin_manager().hook.posterior_saved(folder=str(folder))

        return with_sigma

    def save_sigma(self, folder: Path, adapter: str) -> None:
        if self.best_folder is not None:
            # The weights are those of an earlier checkpoint now, and so is their σ.
            best = Posterior.from_pretrained(self.best_folder)
            save_sigma(folder, best.sigma, best.metadata)
            return
        states = {name: torch.zeros(()).expand(p.shape) for name, p in self.model.named_parameters()}
        states |= {name: self.optimizer.sigma(param).cpu() for name, param in self.names.items()}
        sigma = get_peft_model_state_dict(
            self.model, state_dict=states, adapter_name=adapter, save_embedding_layers=False
        )
        # What is in the file without having been trained (a resized embedding, say) has σ = 0.
        saved = TensorFile(folder / MEAN_FILE).entries
        zeros = {key: torch.zeros(()).expand(entry.shape) for key, entry in saved.items()}
        save_sigma(folder, {key: sigma.get(key, zero).contiguous() for key, zero in zeros.items()}, self.header())

    def header(self) -> dict[str, str]:
        group = self.optimizer.param_groups[0]
        return {
            **self.facts,
            "ess": str(group["ess"]),
            "h0": str(group["h0"]),
            "beta1": str(group["betas"][0]),
            "beta2": str(group["betas"][1]),
            "clip": str(group["clip"]),
            "prior": str(group["prior"]),
            "steps": str(self.trainer.state.global_step),
        }


def peft_model(trainer: Trainer) -> PeftModel:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        raise IVONError(
            f"the model is a {type(model).__name__} without a LoRA adapter: wrap it with peft.getpeft_model"
        )
    return model


def _check_trained_parameters(model: PeftModel, names: list[str]) -> None:
    """Refuse to train what no adapter file holds, since its σ would be lost with its mean."""
    if not names:
        raise IVONError("the model has no trainable parameter: the adapter is frozen (is_trainable=False?)")
    marks = {name: torch.full((), float(i)) for i, name in enumerate(names)}
    state = {name: marks.get(name, torch.full((), -1.0)) for name, _ in model.named_parameters()}
    kept = set()
    for adapter in model.peft_config:
        found = get_peft_model_state_dict(
            model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False
        )
        kept |= {int(mark) for mark in found.values()}
    for i, name in enumerate(names):
        if i not in kept:
            raise IVONError(
                f"{name} is trained but is not part of the adapter: freeze it, or add its module to "
                "lora_target_modules or lora_modules_to_save"
            )
