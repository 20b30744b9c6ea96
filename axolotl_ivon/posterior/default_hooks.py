"""The pruning criteria that ship, through the hook that a third party would use; `ivon-post --help` imports this."""

from __future__ import annotations

from ..hookspecs import Criterion, hookimpl


@hookimpl
def pruning_criteria() -> dict[str, Criterion]:
    """Return the criteria that ship. NumPy is imported only when somebody asks."""
    from .prune import CRITERIA

    return CRITERIA
