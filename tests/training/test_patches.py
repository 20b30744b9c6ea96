"""What is changed on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainers import lora_weights, make_trainer
from transformers import TrainerCallback

from axolotl_ivon import Posterior, attach


def test_whoever_reads_the_model_at_a_draw_reads_the_mean(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama, tmp_path, save_strategy="no")
    attach(trainer, gamma=10.0)
    compute_loss = trainer.compute_loss
    previous: dict[str, torch.Tensor] = {}
    checked = []

    def reading(model: Any, *args: Any, **kwargs: Any) -> Any:
        if previous:
            drawn = lora_weights(model)
            state = model.state_dict()
            model.save_pretrained(tmp_path / "mid-step")
            posterior = Posterior.from_pretrained(tmp_path / "mid-step")
            for name, mean in previous.items():
                assert not torch.equal(drawn[name], mean)
                assert torch.equal(state[name], mean)
                assert torch.equal(posterior.mean[name.replace(".default", "")], mean)
            assert all(torch.equal(drawn[name], p) for name, p in lora_weights(model).items()), "the draw goes on"
            checked.append(True)
        return compute_loss(model, *args, **kwargs)

    class Note(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **_: Any) -> None:
            previous.update(lora_weights(model))

    trainer.add_callback(Note())
    trainer.compute_loss = reading
    trainer.train()
    assert len(checked) == 5
