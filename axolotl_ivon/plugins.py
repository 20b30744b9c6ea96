"""The plugin manager: the hooks of `hookspecs.py`, with what ships and what third parties have installed."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import entry_points

import pluggy

from . import hookspecs
from .errors import IVONError, one_line

# What ships is registered through the hooks that a third party would use, and named here so that nothing imports it.
SHIPPED = ("axolotl_ivon.posterior.default_hooks", "axolotl_ivon.training.default_hooks")


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """Return the manager with what ships and every installed entry point of the group `axolotl_ivon`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in SHIPPED:
        manager.register(import_module(name), name=name)
    for entry in entry_points(group=hookspecs.PROJECT):
        try:
            manager.load_setuptools_entrypoints(hookspecs.PROJECT, entry.name)
        except Exception as error:
            owner = f" of {entry.dist.name}" if entry.dist else ""
            fix = "fix it, or uninstall the package that provides it"
            raise IVONError(f"the plugin {entry.name}{owner} cannot be loaded ({one_line(error)}); {fix}") from error
    return manager
