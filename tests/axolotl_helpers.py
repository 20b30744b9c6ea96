"""Axolotl plugins that only tests use; a YAML names them in `plugins:`."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class InterruptInForward(BasePlugin):
    """Sends SIGINT in the middle of a forward pass, and notes what the parameters held before and at that moment."""

    AT_PASS = 5

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        compute_loss, passes = trainer.compute_loss, []

        def interrupted(model: Any, *args: Any, **kwargs: Any) -> Any:
            passes.append(1)
            loss = compute_loss(model, *args, **kwargs)
            if len(passes) == self.AT_PASS:
                drawn = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
                torch.save(drawn, os.path.join(cfg.output_dir, "drawn.pt"))
                os.kill(os.getpid(), signal.SIGINT)
            return loss

        trainer.compute_loss = interrupted


class CpuDeviceMap(BasePlugin):
    """On a CPU with several processes axolotl looks for GPUs: it maps the model to device LOCAL_RANK, and asks
    torch whether the devices are peers."""

    def register(self, cfg: Any) -> None:
        import axolotl.utils.trainer

        if not torch.cuda.is_available():
            axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        cfg.device_map = {"": "cpu"}
