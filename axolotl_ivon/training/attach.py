"""IVON-LoRA inside a transformers or TRL Trainer: the optimizer, a draw for every pass, σ beside every adapter."""

from __future__ import annotations

import copy
import logging
import os
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..errors import IVONError, param_ref
from ..optim.ivon import IVONLoRA, without_numpy
from ..posterior.chain import check_prior, prior_header
from ..posterior.posterior import Posterior
from ..settings.presets import Preset, adapted_matrices, resolved, usual_rate
from .beginning import header_of_data
from .callback import PosteriorTraining, trained_parameters
from .checkpoints import remove_unfinished
from .patches import average_in_every_backward_pass, save_sigma_beside_the_mean, show_the_mean
from .prior import gaussian_prior, start_at
from .processes import check_sharding
from .rates import scaled_options
from .rollouts import count_rollout_draws, mixin_for, writes_completions
from .saved import check_that_all_is_saved, names_of, trained_adapters
from .trainer import PosteriorTrainerMixin

LOG = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    *,
    preset: Literal["auto", "paper"] = "auto",
    gamma: float | None = None,
    ess: float | None = None,
    h0: float | None = None,
    clip: float | None = None,
    betas: tuple[float, float | None] = (0.9, None),
    prior: Literal["empirical"] | float | Posterior | str | os.PathLike[str] = "empirical",
    prior_strength: float | None = None,
    hessian: Literal["reparameterized", "squared_gradients"] | None = None,
    direction: Literal["newton", "adam"] | None = None,
    h0_steps: float | None = None,
    rescale_lr: bool = False,
    train_size: int | None = None,
    eval_samples: int = 0,
    draws: Literal["shared", "per_rank"] = "shared",
    rollouts: Literal["mean", "draws"] = "mean",
    rollout_draws: int | None = None,
    calibrate: bool = True,
) -> None:
    """Make a Trainer train with IVON-LoRA, and save σ beside every adapter that it or its model saves.

    Call it once, between creating the Trainer and `trainer.train()`. The learning rate, its schedule and the seed
    are the Trainer's own; one made for AdamW is right with the preset "auto", which is the default here and of the
    plugin; `IVONLoRA` alone has the paper's values as its defaults. `max_grad_norm` is set to 0 if it has
    transformers' default of 1, since a clipped gradient biases the Hessian estimate. The Trainer gets a copy of its
    arguments for this.

    Args:
        trainer: any transformers or TRL Trainer whose model is a PeftModel.
        preset: the values of settings that are not given. "auto" fits them to N, the number of steps and the LoRA
            weights, by the rules of `settings.presets.Preset`. The Trainer's learning rate is then the most that a
            step may move a weight, α = learning_rate/ξ, as it nearly is for AdamW; rates among `lr_scheduler_kwargs`
            (min_lr, lr_end) likewise. At 0 it is one that is usual for the model (`settings.presets.usual_rate`), and
            by `direction` "newton" the one with which a weight can travel 0.125 in the run, but 2.5e-4 at most.
            "paper": γ = 5000 and the defaults of `IVONLoRA`; the learning rate is α.
        gamma: γ of the effective sample size λ = γ·√N.
        ess: λ itself, instead of γ and N.
        h0, clip, betas, hessian, direction, h0_steps, rescale_lr: as in `IVONLoRA`; None for the preset's.
        prior: "empirical" or a number, as in `IVONLoRA`; or the posterior of an earlier run (a `Posterior`, or its
            folder or Hub id), to continue from it without forgetting. `attach` puts its mean into a new adapter, and
            training starts from there and its σ, with N(m₀, σ₀²/κ) as the prior; an adapter that was trained already
            keeps its weights, as a resumed run does. N and λ are those of the new data alone: the earlier data count
            κ times. It must be over the same base model, with the same rank, scaling and targets.
        prior_strength: κ; None for the preset's: 0.1, with a number 1, with a `Posterior` 300; 1 by "paper".
        train_size: N, the number of training examples; the length of the Trainer's dataset by default (give it where
            that dataset is packed or streamed).
        eval_samples: number of draws whose averaged prediction every evaluation scores too, as `eval_loss_posterior`.
        draws: "shared" for one draw in all processes, so that a run does not depend on their number; "per_rank" for
            one each, with gradients and Hessian estimates averaged: less variance, at twice the communication.
        rollouts: what writes the completions of TRL's GRPOTrainer: "mean", or "draws": each group of completions is
            from several draws, and each completion's gradient is taken at the draw that wrote it.
        rollout_draws: number of these draws, a divisor of `num_generations` and `steps_per_generation`; None for 2.
        calibrate: whether the end of training finds out, on at most 256 evaluation examples and in about a tenth of the
            work of training, what to predict with: the mean or draws, and the softmax temperature. It is written as
            `recommended.json` beside the adapter.

    Raises:
        IVONError: the model has no adapter or trains weights outside of it, N is unknown, the Trainer already has an
            optimizer or a weight decay, a value is out of range, or the prior does not fit the adapter.
    """
    model = _adapter_of(trainer)
    params = trained_parameters(model)
    names = names_of(model, params)
    check_that_all_is_saved(model, names)
    given: dict[str, Any] = {"gamma": gamma, "ess": ess, "h0": h0, "clip": clip}
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise IVONError(f"betas: {betas!r} is no pair; give (β1, β2), with None for the preset's β2")
    if train_size is not None and not isinstance(train_size, Integral):
        raise IVONError(f"{param_ref('train_size')}: {train_size!r} is no whole number of training examples")
    given |= {"beta1": betas[0], "beta2": betas[1]}
    given |= {"prior_strength": prior_strength, "hessian": hessian, "direction": direction, "h0_steps": h0_steps}
    given, prior = {name: without_numpy(value) for name, value in given.items()}, without_numpy(prior)
    for name, value in given.items():
        if isinstance(value, str) and name not in ("hessian", "direction"):
            raise IVONError(f"{param_ref(name)}: {value!r} is a string; give a number")
    if prior is None or isinstance(prior, bool):
        raise IVONError(f'{param_ref("prior")}: {prior!r} is no prior; give "empirical", a number or a posterior')
    if not isinstance(eval_samples, Integral) or eval_samples < 0:
        raise IVONError(f"{param_ref('eval_samples')}: {eval_samples!r} is no number of draws; give 0 for none")
    if not isinstance(calibrate, bool):
        raise IVONError(f"{param_ref('calibrate')}: {calibrate!r} is neither True nor False")
    if ess is not None and gamma is not None:
        raise IVONError(f"{param_ref('gamma')} and {param_ref('ess')} are both given: λ is γ·√N or ess, remove one")
    chosen = resolved(preset, given)
    if ess is None and train_size is None:
        train_size = _train_size(trainer)
    # ZeRO-3 leaves an empty tensor where it has partitioned one.
    shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in params.items()}
    earlier = _earlier(prior)
    try:
        chosen = chosen.with_direction(prior, rescale_lr, writes_completions(trainer))
        given_rate, config = float(trainer.args.learning_rate or 0.0), getattr(model.get_base_model(), "config", None)
        usual = partial(usual_rate, config, matrices=adapted_matrices(shapes)) if chosen.has_usual_rate else None
        rate = given_rate or (usual(0.0) if usual else 0.0)  # until it is known of how many epochs the run is
        for_run = partial(chosen.for_run, train_size or 0, shapes)
        settings: dict[str, Any] = {
            "lr": rate,
            **for_run(rate, 1, 0.0),
            "clip": chosen.clip,
            "prior": "empirical" if earlier else prior,
            "prior_strength": chosen.strength(prior, bool(earlier)),
            "hessian": chosen.hessian,
            "h0_steps": chosen.h0_steps,
            "rescale_lr": rescale_lr,
            "seed": trainer.args.seed,
        }
        # This optimizer is made for its checks alone: a wrong value shows here, and not when training begins.
        IVONLoRA([nn.Parameter(torch.zeros(1))], **settings)
    except ValueError as error:
        name, must, rest = str(error).partition(" must ")
        name = {"n": "train_size", "lr": "learning_rate"}.get(name, name)
        raise IVONError(f"{param_ref(name)}{must}{rest}" if must else str(error)) from error
    header = {
        "preset": preset,
        "gamma": "" if ess is not None else str(chosen.gamma or ""),
        "train_size": "" if train_size is None else str(train_size),
    }
    if earlier:
        for name, value in (("h0", h0), ("rescale_lr", rescale_lr or None)):
            if value is not None:
                raise IVONError(f"{param_ref(name)}: {value} does not go with a posterior as prior; remove it")
        settings["prior"] = gaussian_prior(model, names, shapes, earlier)
        header |= prior_header(earlier, settings["prior_strength"], header["train_size"])
    if draws not in ("shared", "per_rank"):
        raise IVONError(f"{param_ref('draws')}: {draws!r} is neither 'shared' nor 'per_rank'")
    writers = count_rollout_draws(trainer, rollouts, rollout_draws)
    if eval_samples and trainer.eval_dataset is None:
        LOG.warning("eval_samples %d has no effect in training: the Trainer has no eval_dataset", eval_samples)
    settings["lr"] = chosen.alpha(rate, rescale_lr)
    trainer.args = copy.copy(trainer.args)  # whoever made them may make another Trainer with them
    _check_arguments(trainer, chosen, preset)
    travel = None if rate else chosen.travel
    if chosen.travel is not None:
        options = trainer.args.lr_scheduler_kwargs
        if isinstance(options, dict):
            trainer.args.lr_scheduler_kwargs = scaled_options(options, 1 / chosen.clip)
        if rate:
            header["learning_rate"] = f"{rate:g}"
            trainer.args.learning_rate = settings["lr"]
    per_rank = draws == "per_rank" and trainer.args.world_size > 1
    run = PosteriorTraining(
        trainer=trainer,
        model=model,
        params=params,
        names=names,
        adapters=trained_adapters(model, names),
        settings=settings,
        header=header,
        eval_samples=eval_samples,
        per_rank=per_rank,
        rollout_draws=writers,
        given_rate=given_rate,
        usual_rate=usual,
        travel=travel,
        settings_for_run=for_run,
        calibrates=calibrate,
    )
    header |= header_of_data(trainer)
    # All is checked: from here on the Trainer and its model change.
    if earlier:
        # Here and not when the optimizer is made: the weights of a checkpoint are loaded before that.
        start_at(settings["prior"], model, params)
    remove_unfinished(trainer)
    average_in_every_backward_pass(trainer)
    save_sigma_beside_the_mean(run)
    show_the_mean(run)
    trainer.posterior_training = run  # type: ignore[attr-defined]
    _put_mixin_first(trainer)
    trainer.add_callback(run)


def _earlier(prior: Any) -> Posterior | None:
    """Return the posterior that is the prior, read from its folder if need be; None for a prior of another kind.

    A temperature that its training chose is undone.
    """
    if isinstance(prior, str | os.PathLike) and prior != "empirical":
        check_prior(str(prior), {})
        prior = Posterior.from_pretrained(prior)
    return prior.temper(1 / prior.training_tau) if isinstance(prior, Posterior) else None


def _put_mixin_first(trainer: Trainer) -> None:
    """Let the Trainer's class be the mixin on top of its own class, by the same name."""
    own, mixin = type(trainer), mixin_for(trainer)
    # A function that somebody has assigned to this Trainer would hide the mixin's: it goes where `super()` finds it.
    overridden = {name for base in mixin.__mro__ if base not in Trainer.__mro__ for name in vars(base)} & {
        *vars(trainer)
    }
    assigned = {name: staticmethod(vars(trainer).pop(name)) for name in overridden}
    parent: type = type(own.__name__, (own,), assigned) if assigned else own
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    trainer.__class__ = type(own.__name__, (mixin, parent), names)


def _adapter_of(trainer: Trainer) -> PeftModel:
    """Return the PEFT model of a Trainer that is not attached to yet."""
    if not isinstance(trainer, Trainer):
        kind = type(trainer).__name__
        raise IVONError(
            f"attach() takes a transformers or TRL Trainer, not a {kind}: make a Trainer, then attach(trainer)"
        )
    if getattr(trainer, "model_init", None) is not None:
        raise IVONError("model_init makes another model when training begins: give the Trainer a model in its place")
    if isinstance(trainer, PosteriorTrainerMixin):
        raise IVONError("attach() was called on this Trainer already; make a new Trainer for other settings")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        kind = type(model).__name__
        raise IVONError(f"the model is a {kind} without a LoRA adapter: wrap it with peft.get_peft_model")
    return model


def _train_size(trainer: Trainer) -> int:
    try:
        return len(trainer.train_dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise IVONError(
            f"the training data has no length, so λ is unknown: give {param_ref('ess')} (or train_size, in Python)"
        ) from error


def _check_arguments(trainer: Trainer, chosen: Preset, preset: str) -> None:
    """Refuse what the Trainer has set that does not go with IVON, and set max_grad_norm to 0 if nobody has set it."""
    args, deepspeed = trainer.args, trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin
    if args.weight_decay:
        raise IVONError(
            f"weight_decay: {args.weight_decay:g} has no effect with IVON-LoRA, whose prior takes its place: "
            f"set it to 0, or {param_ref('prior')} to a number"
        )
    if trainer.optimizer is not None:
        raise IVONError("the Trainer already has an optimizer: call attach() before train(), without optimizers=")
    if chosen.travel is not None and not args.learning_rate:
        chooses = f"{param_ref('preset')} {preset} sets the learning rate"
        if deepspeed and "scheduler" in (deepspeed.deepspeed_config or {}):
            raise IVONError(f"{chooses}: remove the scheduler from the DeepSpeed config")
        if trainer.lr_scheduler is not None:
            raise IVONError(f"{chooses}: give the Trainer no scheduler of your own")
    if args.max_grad_norm == 1.0:  # transformers' default
        args.max_grad_norm = 0.0
    if str(args.metric_for_best_model).endswith("loss_posterior"):
        args.greater_is_better = False  # transformers takes a name that does not end in "loss" for a score
    check_sharding(trainer)
