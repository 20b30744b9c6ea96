"""Reinforcement learning: which weights write the completions, and at which draw the gradient of each is taken.

TRL's Trainers write completions, score them and train on them inside `training_step`, so they would do all of it at the
draw of that pass. Here they do all but the last at the mean, or write each completion at the draw of its gradient.
Derivation: docs/how-it-works.md.

Each method that is overridden, and why:

- `_prepare_inputs` of GRPO and RLOO: in it completions are written, scored and kept; everything in it that runs the
  model must see the mean, also what sends the weights to vLLM.
- `_generate_single_turn` of GRPO: the one method that calls `generate`, or a server; here the draws take turns.
- `_get_per_token_logps_and_entropies` of GRPO: completions of draws are scored at the draw that wrote each, since TRL
  corrects for the difference between what the server computed and what it computes itself.
- `_generate`, `_generate_vllm`, `_generate_completions` of online DPO: it has no `_prepare_inputs` for its completions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from ..errors import IVONError
from ..settings.keys import check_rollouts, sends_adapters
from .processes import is_sharded
from .trainer import PosteriorTrainerMixin

# The number of a batch's draw, in the batch.
DRAW = "ivon_draw"
# TRL's logarithm of the probability at which completions were written: by token, and in RLOO by completion.
_OLD_BY_TOKEN, _OLD = "old_per_token_logps", "old_logps"


class RolloutTrainerMixin(PosteriorTrainerMixin):
    """Overrides of TRL's GRPOTrainer and RLOOTrainer, and of those derived from them."""

    _scores_draws = False  # whether completions of draws are being scored

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Write and score completions at the mean, and take the gradient of a batch at the draw that belongs to it."""
        run, trainer = self.posterior_training, cast(Any, self)
        if run.optimizer is None or not run.optimizer.sampling:  # an evaluation
            return super()._prepare_inputs(inputs)
        kept = trainer._buffered_inputs
        run.optimizer.redraw(None)
        batch: Any = super()._prepare_inputs(inputs)
        if trainer._buffered_inputs is not kept:  # completions were written
            # Axolotl's asynchronous Trainer keeps the batches without the first, and each once an iteration.
            batches = list({id(each): each for each in (batch, *trainer._buffered_inputs)}.values())
            self._give_draws(batches, run.optimizer.draw_number)
        if run.settings["hessian"] == "squared_gradients":
            mask = batch["completion_mask"]  # RLOO's losses are of completions, GRPO's of tokens
            run.losses += len(mask) if _OLD in batch else int(mask.sum())
        run.optimizer.redraw(batch[DRAW])
        return batch

    def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the draws take turns at the completions of a prompt."""
        generate = super()._generate_single_turn  # type: ignore[misc]
        if not self._draws_write:
            return generate(prompt_ids, images, fields, *args, **kwargs)
        turn = self._turn_on_server if cast(Any, self).use_vllm else generate
        completions: list[Any] = [None] * len(prompt_ids)
        log_probabilities: list[Any] | None = None  # by a server
        for k in self._each_draw():
            own = {name: values[k] for name, values in fields.items()}  # of each prompt, as there are no images
            completions[k], computed = turn(prompt_ids[k], images, own, *args, **kwargs)
            if computed is not None:
                log_probabilities = log_probabilities or [None] * len(prompt_ids)
                log_probabilities[k] = computed
        return completions, log_probabilities

    @property
    def _draws_write(self) -> int:
        """How many draws write the completions of this moment: 0 for the mean, which does so in evaluations."""
        run = self.posterior_training
        return run.rollout_draws if run.optimizer is not None and run.optimizer.sampling else 0

    def _turn_on_server(self, prompt_ids: Any, images: Any, fields: Any, *args: Any, **kwargs: Any) -> Any:
        """Send the draw that is in the parameters to the server, as axolotl sends the mean, and let it write."""
        run, trainer = self.posterior_training, cast(Any, self)
        run.shows_draws = True
        try:
            trainer._sync_lora_adapter()
        finally:
            run.shows_draws = False
        # TRL asks the server for so many completions of a prompt. Later versions have the number as an argument.
        generations, trainer._last_loaded_step = trainer.num_generations, trainer.state.global_step
        trainer.num_generations //= run.rollout_draws
        try:
            own = [each // run.rollout_draws for each in args[:1]]
            return super()._generate_single_turn(prompt_ids, images, fields, *own, *args[1:], **kwargs)  # type: ignore[misc]
        finally:
            trainer.num_generations, trainer._last_loaded_step = generations, None  # the server has not the mean

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Score each completion at the draw that wrote it."""
        score = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        if not self._scores_draws:
            return score(model, input_ids, attention_mask, *args, **kwargs)
        parts: list[Any] = []
        for k in self._each_draw():
            own = {name: value[k] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            parts.append(score(model, input_ids[k], attention_mask[k], *args, **own))
        return tuple(map(_put_together, *parts))

    def _each_draw(self) -> Iterator[slice]:
        """Put each draw of a group into the parameters, with the rows that are its own, and then the mean back."""
        optimizer, count = self.posterior_training.optimizer, self.posterior_training.rollout_draws
        first = optimizer.draw_number
        for k in range(count):
            optimizer.redraw(first + k * self._batches_per_draw)
            yield slice(k, None, count)
        optimizer.redraw(None)

    @property
    def _batches_per_draw(self) -> int:
        count = self.posterior_training.rollout_draws
        return cast(Any, self).args.steps_per_generation // count if count else 1

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Note which draw wrote a completion, before TRL shuffles them."""
        count = self._draws_write
        self._scores_draws = bool(count)
        try:
            output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        finally:
            self._scores_draws = False
        if count:
            output[DRAW] = torch.arange(len(output["completion_ids"])) % count
        return output

    def _give_draws(self, batches: list[dict[str, Any]], first: int) -> None:
        """Give each batch the number of its draw, from `first` on, and old log-probabilities at that draw."""
        if self.posterior_training.rollout_draws:
            _sort_by_draw(batches)
        for place, batch in enumerate(batches):
            batch[DRAW] = first + place // self._batches_per_draw * self._batches_per_draw
            self._at_its_draw(batch)

    def _at_its_draw(self, batch: dict[str, Any]) -> None:
        """Replace the old log-probabilities of a batch, where TRL has taken them at the mean, by those at its draw.

        Where each batch is trained on once before the next update, they are what the loss itself computes, and GRPO's
        does so where they are missing.
        """
        trainer, optimizer = cast(Any, self), self.posterior_training.optimizer
        by_token, args = _OLD_BY_TOKEN in batch, trainer.args
        if by_token and args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0:
            del batch[_OLD_BY_TOKEN]
        elif not self.posterior_training.rollout_draws and (by_token or _OLD in batch):
            optimizer.redraw(batch[DRAW])
            mask = batch["completion_mask"]
            log_probabilities = _log_probabilities(trainer, batch)
            optimizer.redraw(None)
            batch |= {_OLD_BY_TOKEN: log_probabilities} if by_token else {_OLD: (log_probabilities * mask).sum(1)}


class OnlineDPOTrainerMixin(PosteriorTrainerMixin):
    """Overrides of TRL's OnlineDPOTrainer, and of those derived from it."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._by_the_mean(super()._generate, *args, **kwargs)  # type: ignore[misc]

    def _generate_vllm(self, *args: Any, **kwargs: Any) -> Any:
        return self._by_the_mean(super()._generate_vllm, *args, **kwargs)  # type: ignore[misc]

    def _generate_completions(self, *args: Any, **kwargs: Any) -> Any:
        return self._by_the_mean(super()._generate_completions, *args, **kwargs)  # type: ignore[misc]

    def _by_the_mean(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        optimizer = self.posterior_training.optimizer
        if optimizer is None or not optimizer.sampling:
            return generate(*args, **kwargs)
        optimizer.redraw(None)
        completions = generate(*args, **kwargs)
        optimizer.redraw(optimizer.draw_number)
        return completions


def mixin_for(trainer: Trainer) -> type[PosteriorTrainerMixin]:
    """Return the class of overrides for a Trainer."""
    if hasattr(trainer, "_generate_and_score_completions") and hasattr(trainer, "_buffered_inputs"):
        return RolloutTrainerMixin
    return OnlineDPOTrainerMixin if hasattr(trainer, "_generate_vllm") else PosteriorTrainerMixin


def writes_completions(trainer: Trainer) -> bool:
    """Return whether this is one of TRL's Trainers that write completions and train on them."""
    return mixin_for(trainer) is not PosteriorTrainerMixin


def count_rollout_draws(trainer: Trainer, rollouts: str, draws: int | None) -> int:
    """Return how many draws write a group of completions, 0 for the mean.

    Raises:
        IVONError: the settings do not go with the Trainer, it shards a model that writes completions, or it writes them
            where nothing here keeps draws out.
    """
    online, own, args = writes_completions(trainer), cast(Any, trainer), cast(Any, trainer.args)
    # What each of TRL's other Trainers that generate has; `rollout_worker` is AsyncGRPOTrainer's.
    if not online and (hasattr(trainer, "generation_config") or hasattr(trainer, "rollout_worker")):
        raise IVONError(
            f"{type(trainer).__name__} writes completions in training, and draws are kept out of those of GRPOTrainer, "
            "RLOOTrainer and OnlineDPOTrainer alone: use one of these, or another optimizer"
        )
    if online and is_sharded(trainer):
        raise IVONError(
            "DeepSpeed and FSDP are not supported where training writes completions; use DDP, or one process"
        )
    hindrances = {
        "async_prefetch": getattr(args, "async_prefetch", 0),
        "continuous batching": getattr(own, "use_transformers_continuous_batching", False),
        "a rollout_func": getattr(own, "rollout_func", None),
        "a replay buffer": getattr(own, "replay_buffer", None),
        "tools": getattr(own, "tools", None) or getattr(own, "environments", None),
        "a processor of images": getattr(own, "_is_vlm", False),
    }
    return check_rollouts(
        rollouts,
        draws,
        online=hasattr(trainer, "num_generations") and hasattr(trainer, "importance_sampling_level"),
        multiples={
            "num_generations": getattr(own, "num_generations", 0),
            "steps_per_generation": getattr(args, "steps_per_generation", 0),
        },
        full_weights="use_vllm" if getattr(own, "use_vllm", False) and not sends_adapters(vars(args)) else "",
        hindrance=next((name for name, value in hindrances.items() if value), ""),
    )


def _sort_by_draw(batches: list[dict[str, Any]]) -> None:
    """Exchange rows of the batches, all of one size, so that each has completions of one draw, the first draw first."""
    order = torch.cat([batch[DRAW] for batch in batches]).argsort(stable=True).chunk(len(batches))
    for name, value in batches[0].items():
        if isinstance(value, Tensor) and value.dim():
            rows = torch.cat([batch[name] for batch in batches])
            for batch, own in zip(batches, order, strict=True):
                batch[name] = rows[own.to(rows.device)]


def _put_together(*parts: Tensor | None) -> Tensor | None:
    """Return the rows of all draws in the order of the completions, where there are values of them."""
    together = torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None
    for k, part in enumerate(parts):
        if together is not None and part is not None:
            together[k :: len(parts)] = part
    return together


def _log_probabilities(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """Return log p of the tokens of a batch's completions, shape [completions, tokens], without a gradient."""
    by_token = trainer._get_per_token_logps_and_entropies
    inputs = {name: batch[name] for name in inspect.signature(by_token).parameters if name in batch}
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with torch.no_grad():
        log_probabilities: Tensor = by_token(trainer.model, ids, mask, batch["completion_ids"].shape[1], **inputs)[0]
    return log_probabilities
