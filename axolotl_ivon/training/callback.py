"""The state of one posterior's training, and what happens at the events of its Trainer."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import IVONError, one_line, param_ref
from ..optim.ivon import Skipped
from ..posterior.adapter import RUN_IDS
from ..posterior.chain import PRIOR_SHA256
from ..posterior.findings import begins_at_zero, findings, travel_finding
from ..settings.presets import LONGEST_SIGN, passes
from .posterior_loss import predicts_next_token
from .processes import agree_on_gradients, average, sum_over_processes
from .saved import sigma_of_checkpoint
from .sharded import ReplicatedAdapter

if TYPE_CHECKING:
    from ..records.recommendation import Recommendation

LOG = logging.getLogger(__name__)

# So many skipped steps in a row are no accident of one batch, nor of a loss scaler that finds its scale.
DIVERGED = 10
NONE_SKIPPED = Skipped(0, 0, None)
# An α below this is a learning rate for AdamW.
_ADAM_LIKE = 1e-3
# TRL's Trainers whose batches have the chosen answers, and below them the rejected ones.
_PAIRED = ("DPOTrainer", "RewardTrainer")
# Weights of each tensor that are remembered, to measure how far they moved.
_REMEMBERED = 4096


@dataclass(eq=False, repr=False)
class PosteriorTraining(TrainerCallback):
    """What the Trainer's overrides, its model and its events share."""

    trainer: Trainer
    model: PeftModel  # without what a Trainer wraps around it
    params: dict[str, nn.Parameter]  # the trained weights, by their names in the model
    names: dict[str, str]  # all names of theirs, and the one in `params`: see `saved.names_of`
    adapters: list[str]  # those with trained weights
    settings: dict[str, Any]  # of the optimizer
    header: Mapping[str, str]  # entries of the header of σ that are no settings of the optimizer
    eval_samples: int  # draws that every evaluation averages over
    per_rank: bool  # whether each process has draws of its own
    rollout_draws: int  # that write a group of completions: 0 where the mean does
    given_rate: float  # the learning rate, or 0 where none is given
    usual_rate: Callable[[float], float] | None  # for the model in so many epochs; None of a preset that has none
    travel: float | None  # how far a weight can get in the run, where the learning rate is chosen for that
    settings_for_run: Callable[[float, int, float], dict[str, Any]]  # at that rate, of that many steps and epochs
    usual: float = 0.0  # what `usual_rate` is of this run
    epochs: float | None = None  # how many the run has, if the Trainer was only given their steps
    optimizer: Any = None  # until the Trainer makes it
    adapter: ReplicatedAdapter | None = None  # the trained weights in each process, under DeepSpeed and FSDP2
    shows_draws: bool = False  # while a draw is sent to a server: saving and state_dict() then give it, not the mean
    begun: bool = False  # before training begins, the optimizer may lack the state that it resumes from
    best_folder: str | None = None  # the checkpoint whose weights the Trainer has loaded at the end
    best: dict[str, Any] = field(default_factory=dict)  # on the first process: σ and header of that, by adapter
    skipped: Skipped = NONE_SKIPPED  # the skipped steps that the log has reported
    losses: int = 0  # how many, in this process, the gradient since the step began is the mean of
    rates: list[float] = field(default_factory=list)  # of all steps: as they are planned, and then as they were
    # Some weights of every B matrix, on the first process alone; a resumed run has those of the prior, or 0.
    start: dict[str, Tensor] = field(default_factory=dict)
    # Whether a resumed run can reconstruct `start`. Only then `moved` goes into the header, since both runs must write
    # the same one.
    known_start: bool = False
    resumed: Mapping[str, str] = field(default_factory=dict)  # the header of the checkpoint that a run resumes from
    verdict: list[tuple[int, str]] = field(default_factory=list)  # how the run went: levels of the log, and texts
    logs_verdict: bool = True  # whether the end of training logs `verdict`
    calibrates: bool = True  # whether the end of training finds out what to predict with
    recommendation: Recommendation | None = None  # what it found, on the first process

    @property
    def draws_as_saved(self) -> bool:
        """Whether the optimizer draws from the posterior that is saved."""
        # An earlier posterior, which counts κ times in the optimizer, counts once in what is saved.
        return hasattr(self.optimizer, "evaluation_draw") and PRIOR_SHA256 not in self.header

    @property
    def holds_its_mean(self) -> bool:
        """Whether the model's weights are this run's mean or its draw, and not other weights loaded since.

        A mean that was only converted to another precision still counts.
        """
        optimizer = self.optimizer
        if self.adapter is not None or optimizer.sampling or getattr(optimizer, "stepping", False):
            return True
        if not hasattr(optimizer, "adopt_parameters"):  # a third party's: its mean may be of another checkpoint
            return True
        return all(
            torch.allclose(param.float(), optimizer.mean(param).to(param.device), rtol=2.0**-7, atol=1e-6)
            for param in self.params.values()
        )

    @property
    def step_bound(self) -> float:
        """How far a step at a learning rate of 1 can move a weight: ξ, and with `rescale_lr` at least h0·ξ."""
        return self.settings["clip"] * (self.settings["h0"] if self.settings["rescale_lr"] else 1.0)

    def fit_to(self, steps: int) -> None:
        """Take the settings for this number of steps, except those that a third party's optimizer has set itself."""
        args = self.trainer.args
        epochs = args.num_train_epochs if args.max_steps <= 0 else self.epochs
        if epochs is None:  # packed batches count as if they were not
            data: Any = self.trainer.train_dataset
            with suppress(TypeError):  # streamed data have no length
                size = int(self.header["train_size"] or len(data))
                # In GRPO and RLOO a batch is of completions, several of a prompt, each trained on several times maybe.
                times = getattr(args, "num_generations", 1) * getattr(args, "num_iterations", 1)
                epochs = passes(steps, size, self.trainer.get_total_train_batch_size(args) / times)
        epochs = epochs or 0.0
        if self.usual_rate:
            self.usual = self.usual_rate(epochs)
            self.header = {**self.header, "learning_rate": f"{self.given_rate or self.usual:g}"}
        settings = self.settings_for_run(self.given_rate or self.usual, steps, epochs)
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group.update({name: value for name, value in settings.items() if group.get(name) == self.settings[name]})
        self.settings |= settings

    def resume_from(self, header: Mapping[str, str], checkpoint: str) -> None:
        """Keep the header of the checkpoint that the run resumes from.

        Raises:
            IVONError: it was trained with another posterior as prior, or with none.
        """
        if self.header.get(PRIOR_SHA256) != header.get(PRIOR_SHA256):
            own, other = (f"from {x['prior']}" if PRIOR_SHA256 in x else "from none" for x in (self.header, header))
            raise IVONError(
                f"{param_ref('prior')}: {checkpoint} started {other} and this run {own}; resume with the same, or "
                "begin a new run in another folder"
            )
        self.resumed = header
        self.header = {**self.header, **{name: header[name] for name in (RUN_IDS,) if name in header}}

    def take_settings_of_the_optimizer(self, before: Mapping[str, Any]) -> None:
        """Take over what the optimizer loaded from a checkpoint, and warn of the settings that differ from `before`."""
        others = {}
        for name, value in self.optimizer.param_groups[0].items():
            known = name in self.settings and name != "lr" and not isinstance(self.settings[name], Mapping)
            if known and value != before.get(name):
                others[name] = value
        self.settings |= others
        if others and self.trainer.is_world_process_zero():
            values = ", ".join(f"{name} {_shown(value)}" for name, value in others.items())
            LOG.warning(
                "resuming with the checkpoint's %s instead of the values set now; to change them, start a run in "
                "another folder",
                values,
            )

    def identify(self, loss: Tensor, batch: Any) -> None:
        """Give the run an id: a digest of its numbers and of its first loss and batch.

        So only an exact repetition has the same id. (The loss alone is 0 in GRPO where all rewards are equal.) By it
        `combine` recognizes adapters made from the same run. A resumed run keeps the id of its checkpoint.
        """
        if RUN_IDS in self.header or self.resumed or not self.trainer.is_world_process_zero():
            return
        values = {**self.trainer.args.to_dict(), **self.settings, "loss": float(loss.detach())}
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        identity = json.dumps([numbers, self.header.get("train_size")], sort_keys=True)
        digest = hashlib.sha256(identity.encode())
        _add(digest, batch)
        self.header = {**self.header, RUN_IDS: digest.hexdigest()[:16]}

    def log_settings(self, lr: float, steps: int) -> None:
        """Log the settings of the run of this peak rate in one line, and where they are from."""
        s, rate = self.settings, f"{lr:.3g}"
        if "learning_rate" in self.header and self.given_rate:
            rate += f" (a step moves a weight by at most the learning_rate, {self.header['learning_rate']}"
            rate += f"; {self.usual:g} is usual for this model)" if self.given_rate < self.usual else ")"
        elif "learning_rate" in self.header:
            rate += f" (no learning_rate is set: {self.header['learning_rate']} is usual for this model)"
        elif self.travel is not None:
            most = lr * self.step_bound
            bound = f"a weight can move by {self.travel:g} in these {steps} steps"
            if math.isclose(most, LONGEST_SIGN):
                bound = f"a step moves a weight by at most {most:.3g}"
            rate += f" (no learning_rate is set: with this one {bound})"
        size = f" for {self.header['train_size']} examples" if self.header["train_size"] else ""
        start = f"from the posterior {self.header['prior']}" if "prior" in self.header else f"h0 {s['h0']:.2g}"
        step = f", steps by Adam's direction, σ at τ {s['tau']:.3g}" if s["direction"] == "adam" else ""
        LOG.info(
            "%s",
            f"preset {self.header['preset']}: λ {s['ess']:.3g}{size}, {start}, β2 {s['betas'][1]:.5g}, "
            f"ξ {s['clip']:g}, Hessian by {s['hessian'].replace('_', ' ')}, prior strength {s['prior_strength']:g}, "
            f"α {rate}{step}",
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.best_folder, self.best, self.begun, self.recommendation = None, {}, True, None
        if not state.is_world_process_zero:
            return
        lr = args.learning_rate
        scheduler: Any = kwargs.get("lr_scheduler")
        # Only schedules with lr_lambdas have their peak in base_lrs; one_cycle, say, has its first rate there.
        if hasattr(scheduler, "lr_lambdas") and not math.isclose(lr, scheduler.base_lrs[0]):
            asked, lr = lr, scheduler.base_lrs[0]
            self.rates = [rate * lr / asked for rate in self.rates] if asked else []
            kept, given = lr, asked
            if "learning_rate" in self.header:
                kept, given = lr * self.step_bound, float(self.header["learning_rate"])
            LOG.warning("the run resumes at the checkpoint's learning_rate %.3g, not at %.3g", kept, given)
        if "learning_rate" in self.header:
            self.header = {**self.header, "learning_rate": f"{lr * self.step_bound:g}"}
        self.log_settings(lr, state.max_steps)
        if args.max_grad_norm:
            LOG.warning(
                "max_grad_norm %g scales the gradients and with them the Hessian estimate, which widens the posterior; "
                "clip already bounds the step: set max_grad_norm to 0",
                args.max_grad_norm,
            )
        by_hand = self.header["preset"] == "paper"  # and so is how far a weight can get
        if lr < _ADAM_LIKE and by_hand:
            LOG.warning(
                "learning_rate %g looks like one for Adam: IVON's step is a natural-gradient step bounded by "
                "clip, and 1e-2 to 1e-1 is the usual range",
                lr,
            )
        fresh = not state.global_step
        factors = {name: p for name, p in self.params.items() if begins_at_zero(name)}
        prior, now = self.settings["prior"], {name: _some(p) for name, p in factors.items()}
        own = isinstance(prior, Mapping)
        known = {name: _some(prior[name][0]) if own else torch.zeros_like(value) for name, value in now.items()}
        at_known = all(torch.equal(now[name], known[name].to(p.dtype).float()) for name, p in factors.items())
        self.known_start = bool(known) and at_known if fresh else "moved" in self.resumed
        self.start = now if fresh and not self.known_start else known
        self.rates = self.rates or [lr] * state.max_steps  # an engine of its own may make the schedule
        finding = travel_finding(sum(self.rates) * self.step_bound, lr, by_hand)
        if not finding.good:
            LOG.warning("%s", finding.text)

    def count_losses(self, inputs: Any) -> None:
        """Count the losses of a batch: the tokens that a language model is to predict, or the examples."""
        if self.settings["hessian"] != "squared_gradients" or not isinstance(inputs, Mapping):
            return  # rows, say, for which completions are yet to be written and counted
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            shifted = labels.dim() > 1 and predicts_next_token(self.model)
            self.losses += int(((labels[..., 1:] if shifted else labels) != -100).sum())
            return
        values = (labels,) if isinstance(labels, Tensor) else inputs.values()
        sizes = (
            len(value) for value in values if isinstance(value, list) or (isinstance(value, Tensor) and value.dim())
        )
        rows, kinds = next(sizes, 1), {kind.__name__ for kind in type(self.trainer).__mro__}
        paired = labels is None and "input_ids" in inputs and not kinds.isdisjoint(_PAIRED)
        self.losses += max(1, rows // 2) if paired else rows

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = 0  # a step that ran out of memory may have left some

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < len(self.rates):  # a plateau is not known before
            # The schedule's own; DeepSpeed's and FSDP2's reach the optimizer only in the step.
            stepped: Any = self.trainer.optimizer
            self.rates[state.global_step] = float(stepped.param_groups[0]["lr"])
        if self.losses:
            count = sum_over_processes(self.losses, next(iter(self.params.values())).device)
            for group in self.optimizer.param_groups:
                group["batch_size"] = max(1.0, count / (args.world_size if self.per_rank else 1))
        if self.per_rank:
            agree_on_gradients(list(self.params.values()))
            self.optimizer.synchronize(average)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Whoever asks a device waits for it, so it is asked only when the Trainer waits anyway.
        if not control.should_log and any(param.device.type != "cpu" for param in self.params.values()):
            return
        step, before, skipped = state.global_step, self.skipped, getattr(self.optimizer, "skipped", None)
        if skipped is None or skipped == before:
            return
        self.skipped = skipped
        if skipped.in_a_row >= DIVERGED > before.in_a_row:
            LOG.error(
                "the run diverges: the last %d steps were skipped, since the gradient of %s is not finite; m and σ are "
                "those of step %d: begin again with a smaller learning_rate (a resumed run keeps its checkpoint's)",
                skipped.in_a_row,
                skipped.tensor,
                step - skipped.in_a_row,
            )
        elif 0 < skipped.in_a_row < DIVERGED or skipped.total > before.total + skipped.in_a_row:
            number = skipped.total - before.total
            steps = f"step {step} was" if number == 1 and skipped.in_a_row else f"{number} steps up to step {step} were"
            LOG.warning("%s skipped: the gradient of %s is not finite", steps, skipped.tensor)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from .calibration import NO_LABELS, recommend_in_checkpoint

        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and Path(best).is_dir():
            self.best_folder = best
            self.best = sigma_of_checkpoint(Path(best), self.adapters) if state.is_world_process_zero else {}
        calibrated = self._calibrate(self._examples_seen(args, state))
        if not state.is_world_process_zero:
            return
        movement = self.movement(state.global_step)
        spread = self.optimizer.summary().get("ivon_log_sigma_spread") if hasattr(self.optimizer, "summary") else None
        betas = self.settings["betas"]
        inherited = PRIOR_SHA256 in self.header
        for finding in findings(
            movement.get("moved"), movement["travel"], spread, state.global_step, betas[1], inherited=inherited
        ):
            warns = finding.about == "weights" and not finding.good
            self.verdict.append((logging.WARNING if warns else logging.INFO, finding.text))
        checkpoint = recommend_in_checkpoint(self)
        saved = checkpoint if self.logs_verdict and checkpoint else args.output_dir  # axolotl still saves there
        self.verdict.append((logging.INFO, f"next: `ivon-post check {shlex.quote(str(saved))}`"))
        if calibrated:
            could = self.trainer.eval_dataset is not None and not hasattr(self.trainer, "reward_funcs")
            lacking = self.recommendation is None and could and NO_LABELS not in calibrated
            self.verdict.append((logging.WARNING if lacking else logging.INFO, calibrated))
        if self.logs_verdict:
            log_verdict(self.verdict)

    def _examples_seen(self, args: Any, state: Any) -> int:
        """Return of how many examples the run has taken gradients, each epoch counted: a packed row has several."""
        data = self.trainer.train_dataset
        if state.epoch and data is not None and hasattr(data, "__len__"):  # the epochs of streamed data are none
            return round(state.epoch * int(self.header["train_size"] or len(data)))
        return int(state.global_step * self.trainer.get_total_train_batch_size(args))

    def _calibrate(self, seen: int) -> str:
        """Find out what to predict with; whatever fails there, the trained adapter is still to be saved."""
        from .calibration import calibrate

        if not self.calibrates:
            return ""
        try:
            self.recommendation, text = calibrate(self, seen)
        except Exception as error:
            LOG.debug("calibration failed", exc_info=True)
            text = f"not calibrated: {one_line(error) or type(error).__name__}"
        return text

    def movement(self, step: int) -> dict[str, float]:
        """Return how far a weight could have moved by then, `travel`, and how far one of a B matrix has, `moved`."""
        movement, moved, count = {"travel": sum(self.rates[:step]) * self.step_bound}, 0.0, 0
        for name, was in self.start.items():
            size = self.params[name].numel()
            moved += size * float((_some(self.optimizer.mean(self.params[name])) - was).abs().mean())
            count += size
        return {**movement, "moved": moved / count} if count else movement


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def log_verdict(verdict: list[tuple[int, str]]) -> None:
    """Log the lines of a run's verdict, and empty the list."""
    while verdict:
        LOG.log(*verdict.pop(0))


def _some(values: Tensor) -> Tensor:
    """Return up to some thousand values of a tensor, evenly spread over it, float32 on the CPU."""
    flat = values.detach().flatten()
    return flat[:: max(1, math.ceil(flat.numel() / _REMEMBERED))].to("cpu", torch.float32, copy=True)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by their names in the model."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _add(digest: Any, batch: Any) -> None:
    """Add texts, whole numbers and token ids of a batch, however nested, to a digest of hashlib."""
    if isinstance(batch, Mapping):
        batch = [part for name in sorted(batch, key=str) for part in (name, batch[name])]
    if isinstance(batch, (list, tuple)):
        for part in batch:
            _add(digest, part)
    elif isinstance(batch, Tensor) and not batch.is_floating_point():
        digest.update(batch.detach().cpu().numpy().tobytes())
    elif isinstance(batch, (str, int)):
        digest.update(str(batch).encode())
