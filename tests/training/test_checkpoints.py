"""What a Trainer's run writes: checkpoints that are whole or not there, and no mean without its σ."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainers import Spy, as_saved, lora_weights, same
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from axolotl_ivon import IVONError, Posterior, attach
from axolotl_ivon.training.checkpoints import _remove_oldest

MEAN, SIGMA = "adapter_model.safetensors", "ivon_sigma.safetensors"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_save_that_fails_leaves_no_checkpoint(part: str, attached: Any, tmp_path: Path) -> None:
    """The Trainer would leave its folder half full, and resume from it."""
    trainer = attached(max_steps=6, save_steps=2)
    save, calls = getattr(trainer, part), []

    def fails(*args: Any) -> None:
        calls.append(names(tmp_path))
        if len(calls) == 2:
            raise OSError("the disk is gone")
        save(*args)

    setattr(trainer, part, fails)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert calls == [{".checkpoint-2.tmp"}, {"checkpoint-2", ".checkpoint-4.tmp"}]
    assert names(tmp_path) == {"checkpoint-2"}
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_is_there_is_replaced_whole(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "stale").touch()
    trained(max_steps=4, save_steps=2)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    assert names(tmp_path / "checkpoint-2") == names(tmp_path / "checkpoint-4")


def test_what_a_killed_run_left_is_removed(attached: Any, tmp_path: Path) -> None:
    for name in (".checkpoint-2.tmp/checkpoint-2", ".adapter.0123abcd.tmp", "mine.tmp"):
        (tmp_path / name).mkdir(parents=True)
    attached()
    assert names(tmp_path) == {"mine.tmp"}


def test_the_limit_and_the_best_checkpoint(made: Any, tmp_path: Path) -> None:
    """As the Trainer has it without us: the newest and the best stay, and the state names the best by its place."""

    def run(folder: str, ours: bool) -> tuple[set[str], str, str]:
        options = {"save_total_limit": 2, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
        trainer, output = made(folder, max_steps=5, save_steps=1, **options), tmp_path / folder
        losses = iter([5.0, 1.0, 4.0, 3.0, 2.0])
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_loss": next(losses)}
        if ours:
            attach(trainer, clip=0.1)
        trainer.train()
        state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
        places = [trainer.state.best_model_checkpoint, state["best_model_checkpoint"]]
        return names(output), *(str(Path(place).relative_to(output)) for place in places)

    expected = ({"checkpoint-2", "checkpoint-5"}, "checkpoint-2", "checkpoint-2")
    assert run("theirs", ours=False) == expected
    assert run("ours", ours=True) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("best", [None, 1, 3])
def test_as_many_checkpoints_stay_as_the_limit_says(limit: int, best: int | None, tmp_path: Path) -> None:
    """After every save as many as with the Trainer's own rule."""
    for step in range(1, 13):
        for folder, remove in (("ours", _remove_oldest), ("theirs", rotate_checkpoints)):
            run = tmp_path / folder
            (run / f"checkpoint-{step}").mkdir(parents=True)
            remove(str(run), limit, str(run / f"checkpoint-{best}") if best and best <= step else None)
        assert names(tmp_path / "ours") == names(tmp_path / "theirs")


def test_resuming_from_another_optimizer_is_refused(made: Any, attached: Any, tmp_path: Path) -> None:
    made(max_steps=2, save_steps=2).train()
    with pytest.raises(IVONError, match=r"checkpoint-2 was trained with another optimizer, as it has no ivon_sigma"):
        attached(max_steps=4).train(resume_from_checkpoint=True)


def test_resuming_at_the_end_trains_no_further(trained: Any, attached: Any, tmp_path: Path) -> None:
    """In the middle of an epoch; the Trainer itself takes one step more."""
    run = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    trained(**run).save_model(str(tmp_path / "first"))
    again = attached(**run)
    again.train(resume_from_checkpoint=True)
    again.save_model(str(tmp_path / "second"))
    assert again.state.global_step == 4
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "first", "second"}
    for name in (MEAN, SIGMA):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_before_training_a_posterior_is_not_overwritten(
    attached: Any, tiny_adapter: Path, copied: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """axolotl saves the model when it is interrupted, however early: a run that was resumed into its own folder."""
    folder = copied(tiny_adapter)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trainer = attached(folder="run")
    with caplog.at_level(logging.WARNING, "axolotl_ivon"):
        trainer.model.save_pretrained(folder)
    assert "left as it is" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    trainer.model.save_pretrained(folder.parent / "fresh")
    assert MEAN in names(folder.parent / "fresh")
    assert SIGMA not in names(folder.parent / "fresh")


def test_a_worker_of_the_data_loader_saves_nothing(trained: Any, tmp_path: Path) -> None:
    """Ctrl-C reaches it too, and by axolotl's handler it would save the weights of when it was forked."""
    model = trained(max_steps=1, save_strategy="no").model
    if not (worker := os.fork()):
        with contextlib.suppress(BaseException):
            model.save_pretrained(tmp_path / "out")
        os._exit(0)
    os.waitpid(worker, 0)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / SIGMA).is_file()


def test_saving_over_an_adapter_keeps_what_else_is_there(trained: Any, tiny_adapter: Path, copied: Any) -> None:
    folder = copied(tiny_adapter)
    (folder / "README.md").write_text("---\nlanguage: en\n---\n# My adapter\n")
    (folder / "notes.txt").write_text("mine")
    trainer = trained(folder="run", max_steps=1, save_strategy="no")
    trainer.model.save_pretrained(folder)
    assert "# My adapter" in (folder / "README.md").read_text()
    assert (folder / "notes.txt").read_text() == "mine"
    assert names(folder) == names(tiny_adapter) | {"notes.txt"}
    assert same(load_file(folder / MEAN), as_saved(lora_weights(trainer.model)))
    Posterior.from_pretrained(folder)


@pytest.mark.parametrize("ours", [False, True], ids=["theirs", "ours"])
def test_the_best_checkpoint_of_a_run_that_was_moved(ours: bool, made: Any, tmp_path: Path) -> None:
    """As the Trainer has it without us: it is found where the run is now, though none that follows is better."""

    def run(folder: str, losses: list[float], steps: int, resume: bool = False) -> Any:
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
        trainer = made(folder, max_steps=steps, save_steps=2, **best)
        evaluate, left = trainer.evaluate, iter(losses)
        trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_loss": next(left)}
        if ours:
            attach(trainer, clip=0.1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run("old", [1.0, 2.0], 4)
    (tmp_path / "old").rename(tmp_path / "moved")
    trainer = run("moved", [3.0], 6, resume=True)
    best = tmp_path / "moved" / "checkpoint-2"
    state = json.loads((tmp_path / "moved" / "checkpoint-6" / "trainer_state.json").read_text())
    assert trainer.state.best_model_checkpoint == state["best_model_checkpoint"] == str(best)
    trainer.save_model(str(tmp_path / "final"))
    for name in (MEAN, SIGMA) if ours else (MEAN,):
        assert same(load_file(tmp_path / "final" / name), load_file(best / name))


def test_the_best_posterior_is_saved_though_its_checkpoint_is_gone(trained: Any, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = trained({"clip": 0.1}, **best)
    folder = Path(trainer.state.best_model_checkpoint)
    kept = Posterior.from_pretrained(shutil.copytree(folder, tmp_path / "kept"))
    shutil.rmtree(folder)
    trainer.save_model(str(tmp_path / "final"))
    final = Posterior.from_pretrained(tmp_path / "final")
    assert same(final.mean, kept.mean)
    assert same(final.sigma, kept.sigma)
    assert final.metadata["steps"] == kept.metadata["steps"]


def test_a_copy_of_the_model_saves_its_own_weights(attached: Any, tmp_path: Path) -> None:
    copies: list[Any] = []

    class Copies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                copies.append((copy.deepcopy(model), lora_weights(model)))

    trainer = attached({"clip": 0.1})
    trainer.add_callback(Copies())
    trainer.train()
    [(kept, weights)] = copies
    kept.save_pretrained(tmp_path / "kept")
    assert same(load_file(tmp_path / "kept" / MEAN), as_saved(weights))
    assert SIGMA not in names(tmp_path / "kept")
    assert not same(load_file(tmp_path / "checkpoint-6" / MEAN), as_saved(weights))
    with trainer.posterior_training.optimizer.sampled_params():
        assert same({k: v for k, v in kept.state_dict().items() if k in weights}, weights)


def test_another_optimizer_s_weights_have_no_sigma_of_ours(
    trained: Any, made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained({"clip": 0.1}, "ours").model
    other = made("other")
    adamw = Trainer(model, other.args, train_dataset=other.train_dataset)
    adamw.train()
    assert SIGMA not in names(tmp_path / "other" / "checkpoint-6")
    assert "is saved without the σ of default, whose weights are not those that this run trained" in caplog.text
    again = Trainer(model, made("again").args, train_dataset=other.train_dataset)
    attach(again)
    caplog.clear()
    again.train()
    assert same(Posterior.from_pretrained(tmp_path / "again" / "checkpoint-6").mean, as_saved(lora_weights(model)))
    assert "without σ" not in caplog.text


def test_without_the_optimizer_s_state_sigma_is_not_forgotten(trained: Any, tmp_path: Path) -> None:
    """h0 counts as ten steps: without knowing that 40 have been taken, the next would count as a tenth of all."""
    run = {"max_steps": 60, "save_steps": 40, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    steps = [Spy(), Spy()]
    whole = trained({}, "whole", callbacks=[steps[0]], **run)
    part = shutil.copytree(tmp_path / "whole" / "checkpoint-40", tmp_path / "part" / "checkpoint-40")
    for name in ("optimizer.pt", "scheduler.pt"):
        (part / name).unlink()
    resumed = trained({}, "part", resume=part, callbacks=[steps[1]], **run)
    for folder, trainer in (("whole", whole), ("part", resumed)):
        trainer.save_model(str(tmp_path / folder / "end"))
    sigmas = [Posterior.from_pretrained(tmp_path / name / "end").sigma for name in ("whole", "part")]
    ratios = torch.cat([(sigmas[1][key] / sigmas[0][key]).log().flatten() for key in sigmas[0]])
    assert ratios.abs().max() < 0.05
    lengths = [
        torch.cat([(after[name] - before[name]).abs().flatten() for name in after]).mean()
        for spy in steps
        for before, after in [spy.means[-20:-18]]
    ]
    assert lengths[1] / lengths[0] == pytest.approx(1, abs=0.6), "its first steps are as long, by a momentum of one"


def test_two_adapters_of_a_model_that_are_trained_in_turn_each_have_their_sigma(
    trained: Any, made: Any, tmp_path: Path
) -> None:
    first = trained({"clip": 0.1}, "one", adapter="a")
    model, other = first.model, made("two")
    model.add_adapter("b", model.peft_config["a"])
    model.set_adapter("b")
    second = Trainer(model, other.args, train_dataset=other.train_dataset)
    attach(second, clip=0.1)
    second.train()
    model.save_pretrained(tmp_path / "both")
    for name in ("a", "b"):
        assert SIGMA in names(tmp_path / "both" / name)
    assert SIGMA in names(tmp_path / "two" / "checkpoint-6" / "b")


def test_weights_that_were_rounded_after_training_keep_their_sigma(trained: Any, tmp_path: Path) -> None:
    trainer = trained({"clip": 0.1})
    trainer.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert SIGMA in names(tmp_path / "half")
