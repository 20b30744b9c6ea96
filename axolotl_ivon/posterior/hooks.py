"""What ships for posteriors, registered through the hooks that a third party would use."""

from __future__ import annotations

from ..hookspecs import Criterion, hookimpl


@hookimpl
def pruning_criteria() -> dict[str, Criterion]:
    from .prune import CRITERIA

    return CRITERIA
