"""The axolotl plugin: `optimizer: ivon_lora`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin

from ..errors import IVONError
from ..settings.keys import attach_parameters, yaml_key
from ..settings.table import OPTIMIZER
from .checks import check_config, slow_on_cpu

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from peft import PeftModel
    from transformers import Trainer

    from ..training.callback import PosteriorTraining

LOG = logging.getLogger(__name__)

# Methods of `rl` for which axolotl has the base model alone, and saves that: TRL puts the adapter into it.
_BASE_ALONE = ("dpo", "ipo", "kto")


class ConfigError(IVONError, SystemExit):
    """A refused YAML: the one line, and no traceback, also where axolotl runs without a command line around it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = f"axolotl-ivon: {message}"


@contextmanager
def _refused_by_key() -> Iterator[None]:
    """Refuse the YAML with the line of the library's error, in which parameters go by the keys that set them."""
    try:
        yield
    except IVONError as error:
        raise ConfigError(error.describe(yaml_key)) from error


class IVONLoRAPlugin(BasePlugin):
    """Trains with IVON-LoRA when the YAML says `optimizer: ivon_lora`, and does nothing otherwise."""

    _verdict: list[tuple[int, str]]
    _post_trains = 0

    def __init__(self) -> None:
        super().__init__()
        self._verdict = []

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the raw YAML; where a preset is to choose the learning rate, fill in 0, since axolotl requires one.

        Raises:
            ConfigError: naming the key, its value and the fix.
        """
        if cfg.get("optimizer") != OPTIMIZER:
            if keys := [str(key) for key in cfg if str(key).startswith("ivon_") and cfg[key] is not None]:
                used = f"optimizer: {cfg['optimizer']}" if cfg.get("optimizer") else "the default optimizer"
                LOG.warning("%s: no effect with %s, only with optimizer: %s", ", ".join(keys), used, OPTIMIZER)
            return
        # Log at axolotl's level; by default it only passes warnings.
        ours = logging.getLogger(__name__.partition(".")[0])
        if ours.level == logging.NOTSET:
            ours.setLevel(logging.getLogger("axolotl").getEffectiveLevel())
        from axolotl.utils.schemas.config import AxolotlInputConfig

        with _refused_by_key():
            _, preset = check_config(cfg, AxolotlInputConfig.model_fields)
        if slow := slow_on_cpu(cfg):
            LOG.warning("%s", slow)
        if preset.travel is not None and not cfg.get("learning_rate"):
            cfg["learning_rate"] = 0.0

    def get_input_args(self) -> str:
        """Return where the keys' schema is."""
        return "axolotl_ivon.settings.keys.IVONArgs"

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Return a name that transformers knows in the optimizer's place."""
        return {"optim": "adamw_torch"} if cfg.optimizer == OPTIMIZER else None

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Put the optimizer, the sampling and the saving of σ into the training loop."""
        if cfg.optimizer != OPTIMIZER:
            return
        from ..training.attach import attach
        from ..training.patches import save_the_adapter_of
        from ..training.processes import check_sharding

        settings = attach_parameters(cfg)
        with _refused_by_key():
            attach(trainer, **settings)
            run: PosteriorTraining = trainer.posterior_training  # type: ignore[attr-defined]
            if not cfg.max_steps or cfg.max_steps < 0:  # axolotl counts the steps, of packed batches too
                run.epochs = float(cfg.num_epochs or 1)
            # To keep the run itself would keep the model.
            if cfg.chat_template_kwargs:
                run.header = {**run.header, "chat_template_kwargs": json.dumps(cfg.chat_template_kwargs)}
            run.logs_verdict, self._verdict, self._post_trains = False, run.verdict, 0
            trainer.args.max_grad_norm = cfg.max_grad_norm or 0.0
            options = trainer.args.lr_scheduler_kwargs or {}
            if cfg.lr_scheduler == "one_cycle" and isinstance(options, dict):  # torch's would set β1 in every step
                trainer.args.lr_scheduler_kwargs = {"cycle_momentum": False, **options}
            if cfg.rl in _BASE_ALONE:
                save_the_adapter_of(run)
            check_sharding(trainer)

    def post_train(self, cfg: DictDefault, model: PeftModel) -> None:
        """Save mean and σ again where axolotl writes an FSDP-trained adapter itself, without asking the model.

        axolotl calls this before and after its last save; the second time the verdict of the run is logged.
        """
        if cfg.optimizer != OPTIMIZER:
            return
        if cfg.fsdp_config and int(os.environ.get("RANK", "0")) == 0:
            model.save_pretrained(cfg.output_dir)
        self._post_trains += 1
        if self._post_trains == 2:
            from ..training.callback import log_verdict

            log_verdict(self._verdict)
