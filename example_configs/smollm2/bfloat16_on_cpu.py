"""An axolotl plugin for a CPU that multiplies bfloat16 in hardware: `make demo` adds it there."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault


class BFloat16OnCPU(BasePlugin):
    """Let `bfloat16: true` load the frozen weights in bfloat16, and train LoRA's in float32 without autocasting.

    The Trainer refuses autocasting on a CPU, and nothing needs it: PEFT casts what goes into LoRA and out of it.
    """

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """Take back what axolotl makes of `bfloat16: true`."""
        return {"bf16": False}
