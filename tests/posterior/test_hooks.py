"""What ships is registered as a third party's would be."""

from __future__ import annotations

from axolotl_ivon.plugins import plugin_manager
from axolotl_ivon.posterior import hooks
from axolotl_ivon.posterior.prune import CRITERIA, criteria


def test_the_criteria_that_ship_come_through_the_hook():
    assert plugin_manager().is_registered(hooks)
    assert hooks.pruning_criteria() == CRITERIA
    assert criteria().items() >= CRITERIA.items()
    assert list(CRITERIA) == ["snr", "sigma", "magnitude", "random"]
