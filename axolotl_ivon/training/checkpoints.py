"""Save an adapter with its σ, and checkpoints that appear whole or not at all.

The Trainer writes a checkpoint's files one after the other into the folder by its final name. A run that is
killed meanwhile leaves a half one, and resuming from the last checkpoint (transformers' `resume_from_checkpoint=True`,
axolotl's `auto_resume_from_checkpoints`) takes it for whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from ..errors import IVONError
from ..optim.ivon import IVONLoRA
from ..plugins import plugin_manager
from ..posterior.adapter import TRAINING_TAU, save_sigma
from ..posterior.card import CARD_FILE, remove_old_results, update_card
from ..posterior.chain import prior_header
from ..posterior.posterior import Posterior
from ..records.recommendation import RECOMMENDED_FILE, Recommendation
from ..settings.table import settings_header
from ..storage.atomic import put_in_place, updated_adapter
from ..storage.format import MEAN_FILE, SIGMA_FILE, header_number
from ..storage.tensorfile import TensorFile
from .calibration import save_recommendation
from .callback import PosteriorTraining, trained_parameters
from .saved import adapter_folder, check_that_all_is_saved, names_of, trained_adapters, weights_in_file

LOG = logging.getLogger(__name__)

_HIDDEN = ".{}.tmp"
_IS_HIDDEN = re.compile(r"\.checkpoint-\d+\.tmp")


def remove_unfinished(trainer: Trainer) -> None:
    """Remove what an earlier run, killed while it was saving, left under hidden names."""
    if trainer.args.should_save:
        for name in ("checkpoint-*", "adapter.*"):
            for left in Path(str(trainer.args.output_dir)).glob(_HIDDEN.format(name)):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def whole_checkpoint(trainer: Any, trial: Any) -> Iterator[None]:
    """Let the Trainer write a checkpoint under a hidden name, and give it its own when it is complete and durable.

    `trainer` writes into `checkpoints_folder` where that is set, as `PosteriorTrainerMixin` does.
    """
    run, name = trainer._get_output_dir(trial), f"checkpoint-{trainer.state.global_step}"
    hidden, target = os.path.join(run, _HIDDEN.format(name)), os.path.join(run, name)
    trainer.checkpoints_folder = hidden
    try:
        yield
        trainer.accelerator.wait_for_everyone()  # every process has written its part
        state, temporary = trainer.state, os.path.join(hidden, name)
        # The Trainer looks for the best one among the hidden names, and the run's folder may have moved since then;
        # a newer Trainer has then forgotten it.
        best = os.path.join(run, f"checkpoint-{state.best_global_step}")
        found = state.best_global_step and (best == target or os.path.isdir(best))
        if found and state.best_model_checkpoint != best:
            state.best_model_checkpoint = best
            if trainer.args.should_save:
                state.save_to_json(os.path.join(temporary, "trainer_state.json"))
        if trainer.args.should_save:
            put_in_place(Path(temporary), Path(target), overwrite=True)
            for folder in sorted(Path(target).rglob(SIGMA_FILE)):
                plugin_manager().hook.posterior_saved(folder=str(folder.parent))
            _remove_oldest(run, trainer.args.save_total_limit, state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()  # nobody looks for it before it is there
    finally:
        trainer.checkpoints_folder = None
        if trainer.args.should_save:
            shutil.rmtree(hidden, ignore_errors=True)


def _remove_oldest(run: str, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints, the newest and the best among them, as the Trainer does; remove each at once."""
    steps = {path: path.name.rpartition("-")[2] for path in Path(run).glob("checkpoint-*") if path.is_dir()}
    paths = [path for path, step in steps.items() if step.isdecimal()]
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, int(steps[path])))
    kept = {paths[-1], Path(best)} if best else {paths[-1]}
    spare = [path for path in paths if path not in kept]
    for path in spare[: max(0, len(paths) - max(limit, len(kept)))] if limit else []:
        shutil.rmtree(path.rename(path.with_name(_HIDDEN.format(path.name))), ignore_errors=True)


def save_with_sigma(
    run: PosteriorTraining, save_pretrained: Callable[..., None], folder: Path, *args: Any, **kwargs: Any
) -> None:
    """Save the model's adapters by PEFT's `save_pretrained`, each with its σ, so that both appear at once."""
    if not run.begun and any((adapter_folder(folder, adapter) / SIGMA_FILE).is_file() for adapter in run.adapters):
        LOG.warning("%s holds a posterior and this run has not begun to train: left as it is", folder)
        return
    adapters = run.adapters if run.begun else []
    others = [*adapters] if adapters and not run.holds_its_mean else []
    if run.best_folder:
        others += [adapter for adapter in adapters if adapter not in (*run.best, *others)]
    if others:
        LOG.warning(
            "%s is saved without the σ of %s, whose weights are not those that this run trained",
            folder,
            ", ".join(others),
        )
        adapters = [adapter for adapter in adapters if adapter not in others]
    _save_adapters(
        folder,
        adapters,
        lambda new: save_pretrained(new, *args, **kwargs),
        partial(_save_sigma, run),
        run.recommendation,
    )
    for adapter in others:
        for name in (SIGMA_FILE, RECOMMENDED_FILE):  # of other weights, which were there before
            (adapter_folder(folder, adapter) / name).unlink(missing_ok=True)


def _save_adapters(
    folder: Path,
    adapters: Sequence[str],
    save_mean: Callable[[Path], Any],
    save_sigma_of: Callable[[Path, str], None],
    recommendation: Recommendation | None = None,
) -> None:
    """Save a model by `save_mean`, and σ, card and recommendation of these adapters so that all appears at once."""
    saved = []
    with updated_adapter(folder) as new:
        if (folder / CARD_FILE).is_file():
            shutil.copyfile(folder / CARD_FILE, new / CARD_FILE)  # PEFT extends a card that is there
        save_mean(new)
        for adapter in adapters:
            place = adapter_folder(new, adapter)
            if (place / MEAN_FILE).is_file():
                save_sigma_of(place, adapter)
                saved.append(adapter_folder(folder, adapter))
                if recommendation is not None:
                    save_recommendation(recommendation, place, saved[-1].name)
                update_card_in(place)
    for each in saved:
        if recommendation is None:  # one that is there is of another adapter
            (each / RECOMMENDED_FILE).unlink(missing_ok=True)
        with suppress(IVONError):
            remove_old_results(each)
        if not any(_IS_HIDDEN.fullmatch(parent.name) for parent in each.parents):  # a checkpoint is told of when whole
            plugin_manager().hook.posterior_saved(folder=str(each))


def load_adapters(run: PosteriorTraining, checkpoint: Path) -> None:
    """Load the trained adapters' weights from wherever PEFT has saved them."""
    model: Any = run.model
    for adapter in run.adapters:
        model.load_adapter(str(adapter_folder(checkpoint, adapter)), adapter, is_trainable=True)


def adopt_checkpoint(run: PosteriorTraining, checkpoint: Path) -> bool:
    """Take σ from a checkpoint whose weights the Trainer has loaded; return whether it is there, else it stays."""
    sigma: dict[torch.Tensor, torch.Tensor] = {}
    steps = 0
    for adapter in run.adapters:
        folder = adapter_folder(checkpoint, adapter)
        if (folder / SIGMA_FILE).is_file():
            saved = Posterior.from_pretrained(folder)
            steps = int(header_number(saved.metadata, "steps") or 0)
            weights = weights_in_file(run.model, adapter, run.names)
            sigma |= {run.params[weight]: saved.sigma[key] for key, weight in weights.items()}
    if hasattr(run.optimizer, "adopt_parameters"):
        run.optimizer.adopt_parameters(sigma, steps)
    return bool(sigma)


def update_card_in(folder: Path) -> None:
    """Describe the posterior in the card of an adapter's folder, if it has one; a card never fails a run."""
    if (folder / CARD_FILE).is_file():
        try:
            update_card(folder)
        except IVONError as error:
            LOG.warning("the model card does not describe the posterior: %s", error)


def _save_sigma(run: PosteriorTraining, folder: Path, adapter: str) -> None:
    # The weights may be those of an earlier checkpoint by now, and so is their σ.
    if best := run.best.get(adapter):
        save_sigma(folder, *best)
        return
    steps = run.trainer.state.global_step
    movement = run.movement(steps) if run.rates else {}
    moved = {name: f"{value:.6g}" for name, value in movement.items() if name != "moved" or run.known_start}
    header = {**run.header, **moved}
    _save_optimizer_s_sigma(run.model, run.names, run.params, run.optimizer, folder, adapter, header, steps)


def _save_optimizer_s_sigma(
    model: PeftModel,
    names: Mapping[str, str],
    params: Mapping[str, torch.Tensor],
    optimizer: Any,
    folder: Path,
    adapter: str,
    header: Mapping[str, str],
    steps: int,
) -> None:
    """Write σ of an adapter's weights beside their mean in `folder`; `header` is what the optimizer does not know."""
    sigma_of = getattr(optimizer, "sigma_for_next_prior", optimizer.sigma)
    sigma = {key: sigma_of(params[weight]).cpu() for key, weight in weights_in_file(model, adapter, names).items()}
    # What is in the file without having been trained (a resized embedding, say) has σ = 0.
    saved = TensorFile(folder / MEAN_FILE).specs
    zeros = {key: torch.zeros(()).expand(shape) for key, (_, shape) in saved.items()}
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    values = {"prior": group["prior"], **header, **{name: group[name] for name in group if name != "prior"}}
    header = {**header, **settings_header({**values, "beta1": beta1, "beta2": beta2}), "steps": str(steps)}
    if (tau := group.get("tau", 1.0)) != 1:
        header |= {"tau": repr(tau), TRAINING_TAU: repr(tau)}
    save_sigma(folder, {key: sigma.get(key, zero).contiguous() for key, zero in zeros.items()}, header)


def save_posterior(
    model: PeftModel,
    optimizer: IVONLoRA,
    folder: str | os.PathLike[str],
    *,
    train_size: int | None = None,
    prior: Posterior | None = None,
) -> None:
    """Save a PEFT model's adapter and beside it the σ of its optimizer, for `Posterior.from_pretrained` to read.

    It is for training loops without a Trainer: after `attach`, `model.save_pretrained` does it by itself.

    Args:
        model: the PEFT model whose trained weights are the parameters of `optimizer`.
        optimizer: outside of `sampled_params()`, so that the model holds the mean.
        folder: where the adapter goes. Mean and σ take their places together; what else is there stays.
        train_size: N, the number of training examples, for the header; commands that need it say so.
        prior: the posterior that gave m₀ and σ₀ to the optimizer, if one did: the header then keeps the chain.

    Raises:
        IVONError: a draw is in the parameters, a weight is trained by another optimizer or is no part of the adapter,
            or a file cannot be written.
    """
    if optimizer.sampling:
        raise IVONError("save_posterior() was called inside sampled_params(), at a draw; call it after the context")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    params = trained_parameters(model)
    if others := [name for name, param in params.items() if id(param) not in held]:
        raise IVONError(f"{others[0]} is trained and this optimizer does not have it: freeze it, or give it the weight")
    names = names_of(model, params)
    check_that_all_is_saved(model, names)
    size = "" if train_size is None else str(train_size)
    header = {"preset": "", "gamma": "", "train_size": size}
    if prior is not None:
        header |= prior_header(prior, optimizer.param_groups[0]["prior_strength"], size)
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)

    def save_sigma_of(place: Path, adapter: str) -> None:
        _save_optimizer_s_sigma(model, names, params, optimizer, place, adapter, header, steps)

    adapters = trained_adapters(model, names)
    _save_adapters(Path(folder), adapters, lambda new: model.save_pretrained(str(new)), save_sigma_of)
