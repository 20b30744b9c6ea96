"""What the log of a run warns of; a run whose gradients are not finite, and what is kept."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import Spy, lora_weights, make_trainer

from axolotl_ivon import Posterior, attach

TENSOR = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight"


def train(tiny_llama: Path, tmp_path: Path, bad: set[int], **args: Any) -> Spy:
    """Train with a gradient that is not finite, in `TENSOR` and the one after it, at steps `bad`."""
    spy = Spy()
    trainer = make_trainer(tiny_llama, tmp_path, None, [spy], learning_rate=1e-1, **args)
    attach(trainer)
    names = dict(trainer.model.named_parameters())

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.nan if trainer.state.global_step + 1 in bad else 1.0)

    names[TENSOR].register_hook(spoil)
    names[TENSOR.replace("lora_A", "lora_B")].register_hook(spoil)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    return spy


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "axolotl_ivon.training.callback"
    ]


def test_the_step_and_the_first_tensor_are_told(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = train(tiny_llama, tmp_path, {2, 5}, max_steps=6)
    told = [text for _, text in messages(caplog) if "skipped" in text]
    assert told == [f"step {step} was skipped: the gradient of {TENSOR} is not finite" for step in (2, 5)]
    for step in (2, 5):
        assert all(torch.equal(spy.means[step - 1][name], spy.means[step - 2][name]) for name in spy.means[0])


def test_a_run_that_diverges_says_so_once_and_keeps_the_last_good_state(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = train(tiny_llama, tmp_path, set(range(4, 17)), max_steps=16, save_strategy="no")
    told = messages(caplog)
    errors = [text for level, text in told if level == logging.ERROR]
    assert len([text for _, text in told if "was skipped" in text]) == 9, "from the tenth on it is one story"
    (error,) = errors
    assert error.startswith("the run diverges: the last 10 steps were skipped")
    assert TENSOR in error
    assert "those of step 3:" in error
    posterior = Posterior.from_pretrained(tmp_path / "final")
    for name, mean in spy.means[2].items():
        assert torch.equal(posterior.mean[name.replace(".default", "")], mean)
    assert all(sigma.isfinite().all() and (sigma > 0).all() for sigma in posterior.sigma.values())


def test_gradient_clipping_is_off_unless_it_was_asked_for(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=1)
    attach(trainer)
    assert trainer.args.max_grad_norm == 0
    trainer.train()
    assert "max_grad_norm" not in caplog.text
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=1, max_grad_norm=0.3)
    attach(trainer)
    assert trainer.args.max_grad_norm == 0.3
    trainer.train()
    assert "max_grad_norm 0.3" in caplog.text


def test_warnings_say_why(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=4, learning_rate=2e-4, lr_scheduler_type="linear")
    attach(trainer, preset="paper", clip=0.01)
    trainer.train()
    assert "learning_rate 0.0002 looks like one for Adam" in caplog.text
    reach = 2e-4 * 0.01 * (1 + 0.75 + 0.5 + 0.25)
    assert f"farther than {reach:.3g}" in caplog.text
    assert f"with {2e-4 * 0.13 / reach:.2g} it is 0.13" in caplog.text
    caplog.clear()
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=4, learning_rate=0.1)
    attach(trainer, clip=1.0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "axolotl_ivon" not in caplog.text


def test_a_gradient_that_is_not_finite_is_told_with_its_step(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy()
    trainer = make_trainer(tiny_llama, tmp_path, None, [spy], max_steps=3)
    attach(trainer)
    compute_loss, calls = trainer.compute_loss, []

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return compute_loss(*args, **kwargs) * (math.nan if len(calls) == 2 else 1.0)

    trainer.compute_loss = spoiled
    trainer.train()
    assert "step 2 was skipped" in caplog.text
    first, second, third = spy.means
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)


def test_the_last_words_say_how_far_the_weights_moved_and_the_header_keeps_it(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=4, save_steps=2, lr_scheduler_type="linear")
    before = lora_weights(trainer.model)
    attach(trainer, preset="paper", clip=0.01)
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        trainer.train()
    after = {name: weight for name, weight in lora_weights(trainer.model).items() if "lora_B" in name}
    apart = [(weight - before[name]).abs().flatten() for name, weight in after.items()]
    moved, allowed = float(torch.cat(apart).mean()), 3e-2 * 0.01 * (1 + 0.75 + 0.5 + 0.25)
    header = Posterior.from_pretrained(tmp_path / "checkpoint-4").metadata
    assert float(header["moved"]) == pytest.approx(moved, rel=1e-3)
    assert float(header["travel"]) == pytest.approx(allowed, rel=1e-4)
    (weights_level, weights), (sigma_level, sigma), (_, following) = messages(caplog)[-3:]
    assert weights_level == logging.WARNING
    assert f"hardly moved: by {moved:.1g} on average, {moved / allowed:.0%} of the {allowed:.3g}" in weights
    assert sigma_level == logging.INFO
    assert "σ was not learned" in sigma
    assert f"ivon-post check {tmp_path}" in following
    # Half a run allows what its first steps allow, and a resumed one what an uninterrupted one does.
    half = Posterior.from_pretrained(tmp_path / "checkpoint-2").metadata
    assert float(half["travel"]) == pytest.approx(3e-2 * 0.01 * 1.75, rel=1e-4)
    again = make_trainer(tiny_llama, tmp_path, max_steps=4, save_steps=2, lr_scheduler_type="linear")
    attach(again, preset="paper", clip=0.01)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Posterior.from_pretrained(tmp_path / "checkpoint-4").metadata == header


def test_an_adapter_that_goes_on_is_judged_from_where_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, {"init_lora_weights": "pissa"}, max_steps=1, save_steps=1)
    attach(trainer, clip=0.01)
    trainer.train()
    moved = trainer.posterior_training.movement(1)
    assert 0 < moved["moved"] <= moved["travel"]
    # A resumed run, whose header must be the same, would not know where it began.
    assert "moved" not in Posterior.from_pretrained(tmp_path / "checkpoint-1").metadata
    plain = make_trainer(tiny_llama, tmp_path / "plain", max_steps=1, save_steps=1)
    for name, param in plain.model.named_parameters():
        param.requires_grad_("lora_A" in name)
    attach(plain)
    plain.train()
    header = Posterior.from_pretrained(tmp_path / "plain" / "checkpoint-1").metadata
    assert "moved" not in header
    assert float(header["travel"]) > 0
