"""The axolotl plugin: `optimizer: ivon_lora`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin

from ..errors import IVONError
from ..settings.keys import DEFAULTS, attach_parameters, check_values, prior_folder, yaml_key
from ..settings.presets import PRESETS
from ..settings.table import OPTIMIZER

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from peft import PeftModel
    from transformers import Trainer

    from ..training.callback import PosteriorTraining

LOG = logging.getLogger(__name__)

# Keys that need another optimizer, or act on what IVON does not have; and the way out of each.
_WITHOUT_EFFECT = {
    "loraplus_lr_ratio": "remove it: IVON's step is bounded for every weight by ivon_clip",
    "loraplus_lr_embedding": "remove it: IVON's step is bounded for every weight by ivon_clip",
    "lr_groups": "remove it: all weights share learning_rate",
    "embedding_lr": "remove it: all weights share learning_rate",
    "embedding_lr_scale": "remove it: all weights share learning_rate",
    "relora": "remove it: merging while training discards the posterior",
    "lisa_n_layers": "remove it: LISA trains base layers, not an adapter",
    "optim_args": "set the ivon_* keys instead",
    "optim_target_modules": "remove it: GaLore and its like replace the optimizer",
    "adam_beta1": "use ivon_beta1",
    "adam_beta2": "use ivon_beta2",
    "adam_epsilon": "remove it: IVON has no epsilon",
    "unfrozen_parameters": "remove it: only adapter weights are trained",
}
# Trainers whose rollouts would come from a draw, not the mean.
_ONLINE_RL = ("grpo", "gdpo", "ebft", "rloo", "ppo")


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
        with _refused_by_key():
            given = check_values(cfg)
            _check_setting(cfg)
            if folder := prior_folder(given.get("ivon_prior")):
                _check_prior(cfg, folder)
        preset = PRESETS[{**DEFAULTS, **given}["ivon_preset"]]
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
        from ..posterior.posterior import Posterior
        from ..training.attach import attach
        from ..training.processes import check_sharding

        settings = attach_parameters(cfg)
        with _refused_by_key():
            if (folder := prior_folder(cfg.ivon_prior)) is not None:
                settings["prior"] = Posterior.from_pretrained(folder)
            attach(trainer, **settings)
            run: PosteriorTraining = trainer.posterior_training  # type: ignore[attr-defined]
            # To keep the run itself would keep the model.
            run.logs_verdict, self._verdict, self._post_trains = False, run.verdict, 0
            trainer.args.max_grad_norm = cfg.max_grad_norm or 0.0
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


def _check_prior(cfg: Mapping[str, Any], folder: str) -> None:
    """Refuse an earlier adapter that does not fit the YAML, before a model is loaded."""
    from ..posterior.chain import check_prior

    named = f"ivon_prior: {folder}"
    begin = cfg.get("lora_model_dir")
    if begin and str(begin) != folder and os.path.realpath(str(begin)) != os.path.realpath(folder):
        raise IVONError(f"{named} is not lora_model_dir: {begin}; name the same adapter in both, or ivon_prior alone")
    if cfg.get("output_dir") and os.path.realpath(str(cfg["output_dir"])) == os.path.realpath(folder):
        raise IVONError(f"{named} is output_dir as well, and would be overwritten; choose another output_dir")
    if cfg.get("ivon_h0") is not None:
        raise IVONError(f"ivon_h0: {cfg['ivon_h0']} has no effect with {named}, whose σ it begins with; remove it")
    if cfg.get("ivon_rescale_lr"):
        raise IVONError(f"ivon_rescale_lr: true does not go with {named}; remove it")
    # With lora_model_dir the adapter is the one that is saved there, whatever the YAML says.
    keys = {} if begin else {"r": "lora_r", "lora_alpha": "lora_alpha"}
    check_prior(folder, {name: int(cfg[key]) for name, key in keys.items() if cfg.get(key) is not None})


def _check_setting(cfg: Mapping[str, Any]) -> None:
    if cfg.get("adapter") not in ("lora", "qlora"):
        raise IVONError(
            f"adapter: {cfg.get('adapter')} does not go with optimizer: {OPTIMIZER}; set adapter: lora or qlora"
        )
    from axolotl.utils.schemas.config import AxolotlInputConfig

    for key, way_out in _WITHOUT_EFFECT.items():
        # Ray's workers get the YAML with all the defaults filled in.
        default = AxolotlInputConfig.model_fields[key].default if key in AxolotlInputConfig.model_fields else None
        if cfg.get(key) and cfg[key] != default:
            raise IVONError(f"{key}: {cfg[key]} has no effect with optimizer: {OPTIMIZER}; {way_out}")
    if float(cfg.get("weight_decay") or 0):
        raise IVONError(
            f"weight_decay: {cfg['weight_decay']} has no effect with optimizer: {OPTIMIZER}; the prior takes its "
            "place: remove it, or set ivon_prior to a number"
        )
    for key in ("streaming", "pretraining_dataset"):
        if cfg.get(key) and cfg.get("ivon_lambda") is None:
            raise IVONError(f"{key}: streamed data has no length for λ; set ivon_lambda, 1e7 say")
    if cfg.get("ivon_eval_samples") and not (cfg.get("val_set_size") or cfg.get("test_datasets")):
        raise IVONError(
            f"ivon_eval_samples: {cfg['ivon_eval_samples']} has no effect without evaluation data; set val_set_size or "
            "test_datasets, or remove it"
        )
    for key in ("rl", "reward_model", "process_reward_model"):
        if cfg.get("ivon_eval_samples") and cfg.get(key):
            raise IVONError(f"ivon_eval_samples averages the predictions of a causal LM; remove it with {key}")
    if cfg.get("rl") in _ONLINE_RL:
        raise IVONError(
            f"rl: {cfg['rl']} is not supported with optimizer: {OPTIMIZER}, its rollouts would come from a draw; "
            "use another optimizer"
        )
