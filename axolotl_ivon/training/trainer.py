"""Overrides of a Trainer's methods while a posterior is trained, each on top of the Trainer's own.

`attach` makes this class the first base of the Trainer's class, so `super()` is whatever the Trainer did before, a
user's subclass included. What is changed on other objects than the Trainer is in `patches.py`.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..errors import IVONError
from ..plugins import plugin_manager
from ..settings.presets import LONGEST_SIGN
from ..storage.format import SIGMA_FILE
from ..storage.tensorfile import TensorFile
from .callback import PosteriorTraining, trained_parameters
from .checkpoints import adopt_checkpoint, load_adapters, update_card_in, whole_checkpoint
from .patches import keep_engine_off_the_adapter
from .posterior_loss import posterior_loss
from .processes import agree_on_gradients, average, is_sharded
from .rates import rate_for, rates
from .saved import adapter_folder, names_of
from .sharded import STATE_FILE, ReplicatedAdapter

LOG = logging.getLogger(__name__)


class PosteriorTrainerMixin(Trainer):
    """Overrides of a transformers Trainer."""

    posterior_training: PosteriorTraining  # what the overrides, the model and the Trainer's events share
    checkpoints_folder: str | None = None  # where a checkpoint goes while it is written, in place of the run's folder

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer that the hook chooses; the only override that does not call the Trainer's own."""
        run = self.posterior_training
        if self.optimizer is None:
            run.params = trained_parameters(run.model)
            run.names = names_of(run.model, run.params)
            if is_sharded(self):
                run.adapter = ReplicatedAdapter(self, run.model, run.params)
                run.params = run.adapter.params
                keep_engine_off_the_adapter(self, run.adapter)
            named = list(run.params.items())
            run.optimizer = plugin_manager().hook.create_optimizer(named_parameters=named, settings=run.settings)
            for group in run.optimizer.param_groups:
                group.setdefault("weight_decay", 0.0)  # axolotl 0.21 reads it from every optimizer
            if run.per_rank:
                run.optimizer.process = self.args.process_index
            self.optimizer = run.adapter.anchor_optimizer(run.optimizer) if run.adapter else run.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, after choosing its peak where no learning rate is given."""
        create_scheduler, run = super().create_scheduler, self.posterior_training
        run.fit_to(num_training_steps)

        def with_peak(lr: float, probe: Any) -> Any:
            self.args.learning_rate, self.lr_scheduler = lr, None
            return create_scheduler(num_training_steps, probe)

        if run.travel is not None or (run.usual_rate and not run.given_rate):
            lr = run.usual / run.step_bound
            if run.travel is not None:
                lr = rate_for(run.travel, run.step_bound, num_training_steps, with_peak)
                lr = min(lr, LONGEST_SIGN / run.step_bound)
            chosen: Any = optimizer or self.optimizer
            for group in chosen.param_groups:
                group["lr"] = group["initial_lr"] = lr
            getattr(chosen, "defaults", {})["lr"] = lr  # where some schedules look
            self.args.learning_rate, self.lr_scheduler = lr, None
        scheduler = create_scheduler(num_training_steps, *([optimizer] if optimizer else ()))
        run.rates = rates(scheduler, num_training_steps)
        return scheduler

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass at a draw."""
        run = self.posterior_training
        context = plugin_manager().hook.sampling_context(trainer=self, optimizer=run.optimizer)
        batch = args[0] if args else kwargs["inputs"]
        run.count_losses(batch)
        averaged_later = run.per_rank and isinstance(model, DistributedDataParallel)
        with context, model.no_sync() if averaged_later else nullcontext():  # type: ignore[operator]
            loss = super().training_step(model, *args, **kwargs)
            run.identify(loss, batch)
            if run.adapter is not None and not run.per_rank:
                average(agree_on_gradients(list(run.params.values())))
            return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Let the loss depend on the anchor where DeepSpeed wants a gradient of something that it owns."""
        result, adapter = super().compute_loss(*args, **kwargs), self.posterior_training.adapter
        if adapter is None or not adapter.engine_wants_gradient:
            return result
        loss, *rest = result if isinstance(result, tuple) else (result,)
        loss = loss + 0 * adapter.anchor.sum()
        return (loss, *rest) if rest else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics of the hooks to a log of the training loss."""
        run = self.posterior_training
        if "loss" in logs and run.optimizer is not None:
            for metrics in reversed(plugin_manager().hook.log_metrics(trainer=self, optimizer=run.optimizer)):
                logs.update(metrics)
            if "grad_norm" in logs and run.adapter is not None and run.adapter.gradient_norm is not None:
                logs["grad_norm"] = float(run.adapter.gradient_norm)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Score the averaged prediction of the draws too."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        run = self.posterior_training
        unlabelled = description == "Prediction" and f"{metric_key_prefix}_loss" not in output.metrics  # type: ignore[operator]
        if run.eval_samples and run.optimizer is not None and not unlabelled:
            loss = posterior_loss(self, run.optimizer, dataloader, run.eval_samples)
            output.metrics[f"{metric_key_prefix}_loss_posterior"] = loss  # type: ignore[index]
        return output

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the adapter's own file too where the model is saved as a sharded state dict, which leaves it out."""
        super().save_model(output_dir, *args, **kwargs)
        run, plugin = self.posterior_training, self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if run.adapter and plugin and "FULL" not in str(plugin.state_dict_type) and self.args.should_save:
            run.model.save_pretrained(str(output_dir or self.args.output_dir), state_dict={})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card over the one saved with the adapter, and describe the posterior in it."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.posterior_training.begun:
            update_card_in(Path(str(self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Let a checkpoint appear whole or not at all.

        With `push_to_hub` the Trainer uploads from the folder while it trains on, so it then writes as usual.
        """
        with nullcontext() if self.args.push_to_hub else whole_checkpoint(self, trial):
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints_folder or super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.posterior_training.adapter is not None and self.args.should_save:
            self.posterior_training.adapter.save_state(Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        run = self.posterior_training
        settings = dict(run.optimizer.param_groups[0])
        paths = [adapter_folder(Path(checkpoint), name) / SIGMA_FILE for name in run.adapters] if checkpoint else []
        sigmas = [path for path in paths if path.is_file()]
        if checkpoint and not sigmas and any(Path(checkpoint).glob("optimizer*")):
            raise IVONError(
                f"{checkpoint} was trained with another optimizer, as it has no {SIGMA_FILE}: begin a new run in "
                "another folder, or set lora_model_dir to it to start from its weights"
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        for path in sigmas:
            run.resume_from(TensorFile(path).metadata, checkpoint)
        if run.adapter is None:
            if not any(Path(checkpoint).glob("optimizer*")):  # save_only_model
                sigma = "and σ" if adopt_checkpoint(run, Path(checkpoint)) else "with a new σ"
                if self.is_world_process_zero():
                    LOG.info("%s has no optimizer state: training goes on from its mean %s", checkpoint, sigma)
        else:
            run.adapter.load_state(Path(checkpoint) / STATE_FILE)
            # DeepSpeed saves the learning rate with the optimizer's state, which it was kept from loading.
            optimizer, scheduler = self.optimizer, self.lr_scheduler
            for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):  # type: ignore[union-attr]
                group["lr"] = lr
        run.take_settings_of_the_optimizer(settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # The base model is frozen, and a replicated adapter's weights come with its state; torch 2.14 fails on weights
        # in a checkpoint of FSDP2 that the model, from which they are taken, does not have.
        run = self.posterior_training
        if run.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            if len(run.model.peft_config) > 1:  # of several adapters the Trainer leaves out the one called default
                load_adapters(run, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the posterior of the best checkpoint: an evaluation draws around its mean, and leaves that."""
        run, best = self.posterior_training, Path(str(self.state.best_model_checkpoint))
        if run.adapter is not None:
            run.adapter.load_state(best / STATE_FILE)
            return
        if run.adapters == ["default"]:
            super()._load_best_model()
        else:  # the Trainer finds none by another name
            load_adapters(run, best)
        adopt_checkpoint(run, best)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train no further than the last step: a Trainer that resumes there would take one more before it looks."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
