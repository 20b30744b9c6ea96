"""axolotl-ivon: LoRA finetuning with the variational optimizer IVON, and the posterior that it yields.

The public names load on first use, so that `import axolotl_ivon` costs nothing and `ivon-post` starts
without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import IVONError
from .hookspecs import hookimpl

if TYPE_CHECKING:
    from .integrations.axolotl import IVONLoRAPlugin
    from .optim.ivon import IVONLoRA, effective_sample_size
    from .posterior.posterior import Posterior
    from .training.attach import attach

__all__ = [
    "IVONError",
    "IVONLoRA",
    "IVONLoRAPlugin",
    "Posterior",
    "attach",
    "effective_sample_size",
    "hookimpl",
]

_HOME = {
    "IVONLoRA": "optim.ivon",
    "effective_sample_size": "optim.ivon",
    "Posterior": "posterior.posterior",
    "attach": "training.attach",
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
