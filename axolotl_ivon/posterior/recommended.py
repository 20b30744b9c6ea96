"""Check that a recommended.json belongs to an adapter, and convert its τ for that adapter. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..storage.format import RECOMMENDED_FILE, read_json
from .adapter import SIGMA_SHA256, UNPRUNED, Adapter, posterior_number
from .tensors import fingerprint

if TYPE_CHECKING:
    from ..records.recommendation import Recommendation


def recommended_in(adapter: Adapter) -> Recommendation | None:
    """Return the recommendation in an adapter's own folder; None where there is none.

    Raises:
        IVONError: the file cannot be read, or is another adapter's. It is never ignored.
    """
    path = adapter.folder / RECOMMENDED_FILE
    if not os.path.lexists(path):
        return None
    from ..records.recommendation import Recommendation

    fix = f"or remove {path}, or leave it out ({param_ref('no_recommended')})"
    try:
        record = Recommendation.parse(read_json(path), str(path))
    except IVONError as error:
        raise IVONError(f"{error}; {fix}") from None
    _check(record, _header(adapter, record), str(path), f", {fix}")
    return record


def recommended_from(path: Path, adapter: Adapter | Mapping[str, str], name: str = "recommended") -> Recommendation:
    """Return the recommendation in a file that the parameter `name` gave, for an adapter or the header of its σ.

    Raises:
        IVONError: the file cannot be read, or is another adapter's.
    """
    from ..records.recommendation import Recommendation

    record = Recommendation.load(path, name)
    header = _header(adapter, record) if isinstance(adapter, Adapter) else adapter
    _check(record, header, f"{param_ref(name)} {path}")
    return record


def provenance(record: Recommendation, header: Mapping[str, str]) -> dict[str, Any]:
    """Return what a recommendation says of its adapter, by which it is known again: fingerprints, and its τ."""
    names = ("mean_sha256", *([SIGMA_SHA256] if record.needs_sigma else []))
    # The τ of draws was measured on top of the adapter's own.
    return {name: header[name] for name in names if name in header} | {"adapter_tau": posterior_number(header, "tau")}


def tau_on_top(record: Recommendation, header: Mapping[str, str], tau: float) -> float:
    """Return the τ to apply to this adapter, which may be tempered already, to reach the recommendation's `tau`."""
    swept = tau * record.adapter_tau
    return math.inf if math.isinf(swept) else swept / posterior_number(header, "tau")


def _header(adapter: Adapter, record: Recommendation) -> Mapping[str, str]:
    """Return the header of σ, which must be of this mean; without σ the mean's fingerprint, as there is no other σ."""
    if record.mean_sha256 is None:
        return adapter.metadata
    if adapter.metadata:
        adapter.check_pair()  # or a later run without IVON has left its weights beside the σ of an earlier one
        return adapter.metadata
    return {"mean_sha256": fingerprint(adapter.mean, adapter.digests()), SIGMA_SHA256: record.sigma_sha256 or ""}


def _check(record: Recommendation, header: Mapping[str, str], named: str, fix: str = "") -> None:
    """Raise IVONError unless the recommendation belongs to the adapter with this header.

    One without a hash belongs to any adapter. `temper` and `prune` may have made the adapter from the evaluated one.
    """
    sha, pruned = record.mean_sha256, posterior_number(header, "pruned_ratio")
    if sha is not None and sha not in (header.get("mean_sha256"), header.get(UNPRUNED)):
        raise IVONError(
            f"{named} was chosen for another adapter (mean_sha256 differs); run `ivon-post sweep` on this one{fix}"
        )
    if record.sigma_sha256 not in (None, header.get(SIGMA_SHA256)):
        raise IVONError(
            f"{named} was chosen for another σ around this mean (sigma_sha256 differs); run `ivon-post sweep` on this "
            f"adapter{fix}"
        )
    if sha is not None and sha == header.get(UNPRUNED) and pruned > record.ratio:
        raise IVONError(
            f"{named}: its ratio is {record.ratio:g}, and {pruned:g} of this adapter are pruned already; use the one "
            "that was swept"
        )
    if math.isinf(posterior_number(header, "tau")) and math.isfinite(swept := record.tau * record.adapter_tau):
        raise IVONError(f"{named}: its tau is {swept:g}, and this adapter is the mean alone; use the one swept")
