"""The plugin manager holds what ships, and what it ships is importable under the names it is listed by."""

from __future__ import annotations

import subprocess
import sys

from axolotl_ivon import hookspecs
from axolotl_ivon.plugins import SHIPPED, plugin_manager


def test_one_manager_with_what_ships() -> None:
    manager = plugin_manager()
    assert manager is plugin_manager()
    assert manager.project_name == hookspecs.PROJECT
    assert [manager.get_plugin(name).__name__ for name in SHIPPED] == list(SHIPPED)
    assert manager.check_pending() is None  # no implementation without a specification


def test_what_ships_implements_what_a_run_and_prune_need() -> None:
    hook = plugin_manager().hook
    for name in ("create_optimizer", "sampling_context", "log_metrics", "pruning_criteria"):
        assert getattr(hook, name).get_hookimpls(), name
    assert {"snr", "sigma", "magnitude", "random"} <= set().union(*hook.pruning_criteria())


def test_the_manager_imports_no_torch() -> None:
    script = "import sys; from axolotl_ivon.plugins import plugin_manager as p; p(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
