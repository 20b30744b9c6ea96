"""axolotl-ivon: LoRA finetuning with the variational optimizer IVON, and the posterior that it yields.

The rooms, from the bottom up; each imports only from rooms below it (the contracts are in pyproject.toml):

    settings      defaults, presets, and the YAML keys
    storage       the files of an adapter: names, safetensors, whole-or-nothing writes
    data          chats in JSONL, and their tokens
    optim         the optimizer IVON-LoRA, and its kernels
    metrics       figures from arrays: NLL, ECE, AUROC, risk and coverage, paired differences
    records       the JSON documents that one command writes and another reads
    posterior     q = N(m, diag(σ²)) over an adapter's weights: read, prune, temper, sample, combine, save
    training      IVON in a transformers Trainer: `attach`, checkpoints, σ beside the adapter
    models        a loaded base model with its adapter, and draws in it
    evaluation    predictions on held-out data, scored
    generation    answers of several draws, and the best of them (MBR)
    inspect       what an adapter holds, how its training went, how two posteriors differ
    decisions     what to use: τ and pruning ratio, when to abstain
    plots         pictures of evaluations
    fitting       σ around an adapter that was trained without one: `fit`
    influence     how much each training row shaped the adapter
    serving       an OpenAI-compatible server that averages over draws
    report        one HTML page of all that was measured
    integrations  the bridges to axolotl and lm-eval

The public names below load on first use: `import axolotl_ivon` imports no torch, and so `ivon-post` starts fast.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import IVONError
from .hookspecs import hookimpl

if TYPE_CHECKING:
    from .decisions.decide import predict
    from .fitting.fit import fit
    from .integrations.axolotl import IVONLoRAPlugin
    from .models.draws import draws, predict_logits
    from .optim.ivon import IVONLoRA
    from .posterior.posterior import Posterior
    from .settings.presets import effective_sample_size
    from .training.attach import attach
    from .training.checkpoints import save_posterior

__all__ = [
    "IVONError",
    "IVONLoRA",
    "IVONLoRAPlugin",
    "Posterior",
    "attach",
    "draws",
    "effective_sample_size",
    "fit",
    "hookimpl",
    "predict",
    "predict_logits",
    "save_posterior",
]

if find_spec("axolotl") is None:  # else `from axolotl_ivon import *` would want it
    __all__.remove("IVONLoRAPlugin")

_HOME = {
    "IVONLoRA": "optim.ivon",
    "effective_sample_size": "settings.presets",
    "Posterior": "posterior.posterior",
    "attach": "training.attach",
    "draws": "models.draws",
    "fit": "fitting.fit",
    "predict": "decisions.decide",
    "predict_logits": "models.draws",
    "save_posterior": "training.checkpoints",
    "IVONLoRAPlugin": "integrations.axolotl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
