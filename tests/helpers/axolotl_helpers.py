"""Axolotl plugins that only tests use; a YAML names them in `plugins:`."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from axolotl_ivon import IVONLoRA


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


class ShardedOnCpu(CpuDeviceMap):
    """DeepSpeed and FSDP2 in CPU processes: accelerate and axolotl know them on accelerators alone, and take the
    environment variable that asks for a CPU to mean neither."""

    def register(self, cfg: Any) -> None:
        super().register(cfg)
        from accelerate import ParallelismConfig, PartialState
        from accelerate.utils import DistributedType

        # FSDP is for several accelerators; the variable below makes the "accelerator" a CPU.
        kind = DistributedType.MULTI_GPU if cfg.get("fsdp_config") else DistributedType.MULTI_CPU
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", kind)
        build_device_mesh = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda self, device_type: build_device_mesh(self, "cpu")
        if cfg.get("deepspeed"):
            import deepspeed.comm

            # axolotl asks for nccl where it is the only process
            init_distributed = deepspeed.comm.init_distributed
            deepspeed.comm.init_distributed = lambda *args, **kwargs: init_distributed(
                *args, **{**kwargs, "dist_backend": "gloo"}
            )


class NotesOfRanks(BasePlugin):
    """Writes a fingerprint of m and σ after every step, a line each, to `rank-0.txt`, `rank-1.txt` and so on."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        trainer.add_callback(_Fingerprints(trainer, f"rank-{os.environ.get('RANK', '0')}.txt"))


class _Fingerprints(TrainerCallback):
    def __init__(self, trainer: Any, name: str) -> None:
        self.trainer, self.path = trainer, Path(trainer.args.output_dir) / name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = (getattr(callback, "optimizer", None) for callback in self.trainer.callback_handler.callbacks)
        optimizer = next(found for found in held if isinstance(found, IVONLoRA))
        params = [param for group in optimizer.param_groups for param in group["params"]]
        digest = hashlib.sha256()
        for tensor in [optimizer.mean(p) for p in params] + [optimizer.sigma(p) for p in params]:
            digest.update(tensor.cpu().numpy().tobytes())
        with self.path.open("a") as file:
            file.write(digest.hexdigest() + "\n")


class RayOnCpu(CpuDeviceMap):
    """axolotl asks Ray for GPUs, in the process that it is started in."""

    def register(self, cfg: Any) -> None:
        super().register(cfg)
        import ray.train

        scaling = ray.train.ScalingConfig
        ray.train.ScalingConfig = lambda **kwargs: scaling(**{**kwargs, "use_gpu": False})


class UseCpu(BasePlugin):
    """transformers wants to be told twice that bfloat16 and float16 are meant for a CPU."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}


class CalibratesOnFew(BasePlugin):
    """Lets so short a run on so few evaluation examples calibrate itself, draws included."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        from axolotl_ivon.training import calibration

        calibration.FEWEST, calibration.SHARE = 2, 1e3
