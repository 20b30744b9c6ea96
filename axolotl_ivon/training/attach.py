"""IVON-LoRA inside a transformers or TRL Trainer: the optimizer, a draw for every pass, σ beside every adapter."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel

from ..errors import IVONError
from .presets import preset as find_preset
from .trainer import PosteriorTraining, peft_model

if TYPE_CHECKING:
    from transformers import Trainer

LOG = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    *,
    preset: Literal["paper", "small_data"] = "paper",
    gamma: float | None = None,
    ess: float | None = None,
    h0: float = 5e-2,
    clip: float | None = None,
    betas: tuple[float, float] = (0.9, 0.9995),
    prior: Literal["empirical"] | float = "empirical",
    train_size: int | None = None,
    eval_samples: int = 0,
    draws: Literal["shared", "per_rank"] = "shared",
) -> None:
    """Make a Trainer train with IVON-LoRA, and save σ beside every adapter that it or its model saves.

    Call it once, between creating the Trainer and `trainer.train()`. The learning rate, its schedule and the seed
    are the Trainer's own; 1e-2 to 1e-1 is the range. `max_grad_norm` is set to 0 if it has transformers' default of
    1, since a clipped gradient biases the Hessian estimate.

    Args:
        trainer: any transformers or TRL Trainer whose model is a PeftModel.
        preset: what γ, λ and clip are where they are not given. "paper": γ = 5000, clip 5e-3. "small_data", for
            hundreds of examples or steps: λ = 10·N, or more where the draws would disturb the model too much
            (`presets.Preset`), clip 1e-2, and the Trainer's learning rate is replaced by the one with which a weight
            can travel 0.125 in the run.
        gamma: γ of the effective sample size λ = γ·√N.
        ess: λ itself, instead of γ and N.
        h0, clip, betas, prior: as in `IVONLoRA`.
        train_size: N, the number of training examples; the length of the Trainer's dataset by default (give it where
            that dataset is packed or streamed).
        eval_samples: number of draws whose averaged prediction every evaluation scores too, as `eval_loss_posterior`.
        draws: "shared" for one draw in all processes, so that a run does not depend on their number; "per_rank" for
            one each, with gradients and Hessian estimates averaged: less variance, at twice the communication.

    Raises:
        IVONError: the model has no adapter or trains weights outside of it, N is unknown, the Trainer already has an
            optimizer, or a value is out of range.
    """
    chosen = find_preset(preset)
    if gamma is not None:
        chosen = chosen._replace(gamma=gamma)
    facts = {"gamma": "", "train_size": "" if train_size is None else str(train_size)}
    if ess is None:
        if train_size is None:
            try:
                train_size = len(trainer.train_dataset)  # type: ignore[arg-type]
            except TypeError as error:
                raise IVONError(
                    "the training data has no length, so λ is unknown: give ess= (or train_size=)"
                ) from error
        try:
            ess = chosen.ess(train_size, h0, _fan_ins(peft_model(trainer)))
        except ValueError as error:
            raise IVONError(str(error)) from error
        facts = {"gamma": str(chosen.gamma or ""), "train_size": str(train_size)}
    if trainer.optimizer is not None:
        raise IVONError("the Trainer already has an optimizer: call attach() before train(), without optimizers=")
    if trainer.args.max_grad_norm == 1.0:
        trainer.args.max_grad_norm = 0.0
    settings: dict[str, Any] = {
        "lr": trainer.args.learning_rate,
        "ess": ess,
        "betas": betas,
        "h0": h0,
        "clip": chosen.clip if clip is None else clip,
        "prior": prior,
        "seed": trainer.args.seed,
    }
    if eval_samples < 0:
        raise IVONError(f"eval_samples: {eval_samples} is negative; give the number of draws, or 0 for none")
    if draws not in ("shared", "per_rank"):
        raise IVONError(f"draws: {draws!r} is neither 'shared' nor 'per_rank'")
    if chosen.travel is not None:
        _check_that_a_rate_can_be_chosen(trainer, preset, settings["clip"])
    training = PosteriorTraining(trainer, settings, facts, eval_samples, draws == "per_rank")
    trainer.add_callback(training)
    if chosen.travel is not None:
        around = training.around_create_scheduler(trainer.create_scheduler, chosen.travel)
        trainer.create_scheduler = around  # type: ignore[method-assign]


def _check_that_a_rate_can_be_chosen(trainer: Trainer, preset: str, clip: float) -> None:
    in_deepspeed = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    if in_deepspeed and "scheduler" in in_deepspeed:
        raise IVONError(f"preset {preset} sets the learning rate: remove the scheduler from the DeepSpeed config")
    if trainer.lr_scheduler is not None:
        raise IVONError(f"preset {preset} sets the learning rate: give the Trainer no scheduler of your own")
    if not math.isfinite(clip):
        raise IVONError(f"clip: {clip} has no learning rate that bounds the travel of preset {preset}; give a number")


def _fan_ins(model: PeftModel) -> list[int]:
    """Return the number of inputs of every LoRA matrix A that is trained."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    # ZeRO-3 leaves an empty tensor where it has partitioned one.
    return [getattr(param, "ds_shape", param.shape)[-1] for name, param in named if ".lora_A." in name]
