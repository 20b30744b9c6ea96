"""What lies outside of the rooms: the hooks, the manager of plugins, and import paths that users have."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pluggy
import pytest

from axolotl_ivon import hookspecs
from axolotl_ivon.plugins import SHIPPED, plugin_manager

FIRST_RESULT = dict.fromkeys(("create_optimizer", "sampling_context"), True)
EVERY_RESULT = dict.fromkeys(("log_metrics", "posterior_saved", "pruning_criteria", "register_commands"), False)


def test_these_hooks_and_no_others() -> None:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    specified = {name: caller for name, caller in vars(manager.hook).items() if not name.startswith("_")}
    assert {name: caller.spec.opts["firstresult"] for name, caller in specified.items()} == FIRST_RESULT | EVERY_RESULT
    assert all(inspect.getdoc(caller.spec.function) for caller in specified.values())


def test_one_manager_with_what_ships_and_a_run_and_prune_need() -> None:
    manager = plugin_manager()
    assert manager is plugin_manager()
    assert manager.project_name == hookspecs.PROJECT
    assert [manager.get_plugin(name).__name__ for name in SHIPPED] == list(SHIPPED)
    assert manager.check_pending() is None  # no implementation without a specification
    for name in ("create_optimizer", "sampling_context", "log_metrics", "pruning_criteria"):
        assert getattr(manager.hook, name).get_hookimpls(), name
    assert {"snr", "sigma", "magnitude", "random"} <= set().union(*manager.hook.pruning_criteria())


@pytest.mark.parametrize("words", [["info", "x"], ["--help"]])
def test_a_plugin_that_cannot_be_loaded_is_named(words: list[str], tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[axolotl_ivon]\nmine = no_such_module\n")
    done = subprocess.run(
        [sys.executable, "-c", "import ivon_post; ivon_post.main()", *words],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the plugin mine of broken cannot be loaded (No module named 'no_such_")
    assert done.stderr.count("\n") == 1


def test_every_public_name_is_there_without_axolotl() -> None:
    program = "import sys; sys.modules['axolotl'] = None\nfrom axolotl_ivon import *\nprint(attach.__name__)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "attach\n"


def test_import_paths_that_users_have() -> None:
    pytest.importorskip("axolotl")  # it and lm-eval are extras
    pytest.importorskip("lm_eval")
    from axolotl_ivon.args import IVONArgs
    from axolotl_ivon.lm_eval import IVONPosterior
    from axolotl_ivon.plugin import ConfigError, IVONLoRAPlugin

    assert all(isinstance(value, type) for value in (IVONArgs, IVONPosterior, ConfigError, IVONLoRAPlugin))
