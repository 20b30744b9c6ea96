"""The defaults are those of the paper's commonsense runs, the same everywhere, and cost no import."""

from __future__ import annotations

import inspect
import subprocess
import sys

from axolotl_ivon import IVONLoRA, attach, effective_sample_size
from axolotl_ivon.settings.defaults import DEFAULTS
from axolotl_ivon.settings.presets import PRESETS


def test_they_are_the_paper_s() -> None:
    assert (DEFAULTS.gamma, DEFAULTS.h0, DEFAULTS.clip, DEFAULTS.betas) == (5000.0, 5e-2, 5e-3, (0.9, 0.9995))
    assert (DEFAULTS.lr, DEFAULTS.prior) == (1e-2, "empirical")


def test_every_signature_has_them() -> None:
    # None: what the preset says
    of_preset = ("gamma", "h0", "clip", "prior_strength", "hessian", "h0_steps")
    values = {**DEFAULTS._asdict(), **dict.fromkeys(of_preset), "betas": (DEFAULTS.betas[0], None)}
    for name, parameter in inspect.signature(attach).parameters.items():
        if name not in ("trainer", "ess", "train_size"):
            assert parameter.default == values[name], name
    values = {**DEFAULTS._asdict(), "seed": 0, "batch_size": 1}
    for name, parameter in inspect.signature(IVONLoRA).parameters.items():
        if name not in ("params", "ess"):
            assert parameter.default == values[name], name
    assert effective_sample_size(4) == 2 * DEFAULTS.gamma
    assert PRESETS["paper"].beta2 == DEFAULTS.betas[1]
    for name in of_preset:
        assert getattr(PRESETS["paper"], name) == getattr(DEFAULTS, name), name


def test_they_load_without_torch() -> None:
    code = "import axolotl_ivon.settings.defaults, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
