"""Every hook is specified: documented, callable by a plugin manager, and first-result where one answer is wanted."""

from __future__ import annotations

import inspect

import pluggy
import pytest

from axolotl_ivon import hookimpl, hookspecs

HOOKS = {
    "create_optimizer": True,
    "sampling_context": True,
    "log_metrics": False,
    "posterior_saved": False,
    "pruning_criteria": False,
    "register_commands": False,
}


@pytest.fixture
def manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def test_these_hooks_and_no_others(manager: pluggy.PluginManager) -> None:
    specified = {name: caller for name, caller in vars(manager.hook).items() if not name.startswith("_")}
    assert {name: caller.spec.opts["firstresult"] for name, caller in specified.items()} == HOOKS
    assert all(inspect.getdoc(caller.spec.function) for caller in specified.values())


def test_the_first_of_two_optimizers_wins_and_metrics_add_up(manager: pluggy.PluginManager) -> None:
    class Plugin:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def create_optimizer(self, named_parameters: list[object]) -> str:
            return self.name

        @hookimpl
        def log_metrics(self) -> dict[str, float]:
            return {self.name: 1.0}

    for name in ("first", "second"):
        manager.register(Plugin(name))
    # pluggy asks the last registered first
    assert manager.hook.create_optimizer(named_parameters=[], settings={}) == "second"
    assert manager.hook.log_metrics(trainer=None, optimizer=None) == [{"second": 1.0}, {"first": 1.0}]
