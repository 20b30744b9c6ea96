"""Checkpoints of a transformers Trainer that appear whole or not at all, and a resumed run that ends where it must.

The Trainer writes a checkpoint's files one after the other into the folder by which it is found again. A run that is
killed meanwhile leaves a half one, and resuming from the last checkpoint (transformers' `resume_from_checkpoint=True`,
axolotl's `auto_resume_from_checkpoints`) takes it for whole.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.atomic import put_in_place

if TYPE_CHECKING:
    from transformers import Trainer

_HIDDEN = ".{}.tmp"


def whole_checkpoints(trainer: Trainer) -> None:
    """Let a Trainer write every checkpoint under a hidden name, and give it its own when it is complete and durable.

    What an earlier run left under such names is removed. With `push_to_hub` the Trainer uploads from the folder while
    it goes on, so there it writes as ever.
    """
    if trainer.args.should_save:
        for name in ("checkpoint-*", "adapter.*"):
            for left in Path(str(trainer.args.output_dir)).glob(_HIDDEN.format(name)):
                shutil.rmtree(left, ignore_errors=True)
    if not trainer.args.push_to_hub:
        trainer._save_checkpoint = _around(trainer, trainer._save_checkpoint)  # type: ignore[method-assign]


def no_step_past_the_end(trainer: Trainer) -> None:
    """Let a Trainer that resumes from a checkpoint of the last step train no further.

    It looks at the number of steps after each step, so it would train one more.
    """
    run_epoch = getattr(trainer, "_run_epoch", None)
    if run_epoch is None:  # another version of transformers
        return

    @functools.wraps(run_epoch)
    def unless_done(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            run_epoch(*args, **kwargs)

    trainer._run_epoch = unless_done  # type: ignore[method-assign]


def _around(trainer: Trainer, save_checkpoint: Any) -> Any:
    output_dir = trainer._get_output_dir

    @functools.wraps(save_checkpoint)
    def whole(model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        run, name = output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}"
        hidden, target = os.path.join(run, _HIDDEN.format(name)), os.path.join(run, name)
        trainer._get_output_dir = lambda trial: hidden  # type: ignore[method-assign]
        try:
            save_checkpoint(model, trial, *args, **kwargs)
            trainer.accelerator.wait_for_everyone()  # every process has written its part
            state, temporary = trainer.state, os.path.join(hidden, name)
            if state.best_model_checkpoint == temporary:
                state.best_model_checkpoint = target
                if trainer.args.should_save:
                    state.save_to_json(os.path.join(temporary, "trainer_state.json"))
            if trainer.args.should_save:
                put_in_place(Path(temporary), Path(target), overwrite=True)
                _remove_oldest(run, trainer.args.save_total_limit, state.best_model_checkpoint)
            trainer.accelerator.wait_for_everyone()  # nobody looks for it before it is there
        finally:
            trainer._get_output_dir = output_dir  # type: ignore[method-assign]
            if trainer.args.should_save:
                shutil.rmtree(hidden, ignore_errors=True)

    return whole


def _remove_oldest(run: str, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints, the newest and the best among them, as the Trainer does; remove each at once."""
    steps = {path: path.name.rpartition("-")[2] for path in Path(run).glob("checkpoint-*") if path.is_dir()}
    found = [path for path, step in steps.items() if step.isdecimal()]
    found.sort(key=lambda path: (path.stat().st_mtime_ns, int(steps[path])))
    kept = {found[-1], Path(best)} if best else {found[-1]}
    spare = [path for path in found if path not in kept]
    for path in spare[: len(found) - max(limit, len(kept))] if limit else []:
        hidden = path.with_name(_HIDDEN.format(path.name))
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
