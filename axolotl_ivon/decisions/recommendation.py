"""Apply a recommended.json to an adapter. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..evaluation.variants import Variant, VariantChoice
from ..posterior.adapter import Adapter, posterior_number
from ..posterior.recommended import recommended_from, recommended_in, tau_on_top
from ..records.recommendation import DrawsPoint, Recommendation, describe
from ..storage.format import RECOMMENDED_FILE
from .rule import DecisionRule


@dataclass(frozen=True)
class Recommended:
    """What a recommended.json means for one adapter, whose own τ is taken into account.

    Attributes:
        path: the file.
        tau, ratio: what to predict with, `posterior.prune(ratio).temper(tau)`; at τ = ∞ it is the mean, without draws.
        rule: what is made of that prediction.
        draws: τ and T used when draws are asked for, at the same ratio; if draws are recommended, theirs. None: draws
            were never tried, or the adapter is the mean alone.
        mean_temperature: T for the mean: the recommended one if the mean is recommended unpruned, else the one fitted
            to the mean at the same time, else 1.
    """

    path: Path
    tau: float
    ratio: float
    rule: DecisionRule
    draws: DrawsPoint | None
    mean_temperature: float = 1.0

    def choice(self) -> VariantChoice:
        """Return the default rows of an evaluation: the posterior is at the best τ for draws.

        Mean and draws have a second row at their own softmax temperature, unless that is 1, and what is recommended a
        row of its own where it has a threshold, or is none of these.
        """
        draws, rule = self.for_draws(), self.rule
        pairs = {"mean": (math.inf, self.mean_temperature), "posterior": (draws.tau, draws.rule.temperature)}
        added = [
            Variant(f"{name}+temperature", tau, temperature=temperature)
            for name, (tau, temperature) in pairs.items()
            if temperature != 1 and not self.ratio
        ]
        if rule.threshold is not None or (self.ratio and rule.temperature != 1):
            more = {"temperature": rule.temperature, "threshold": rule.threshold, "score": rule.score}
            added.append(Variant("recommended", self.tau, self.ratio, **more))  # type: ignore[arg-type]
        return VariantChoice((), draws.tau, self.ratio, added)

    def for_draws(self) -> Recommended:
        """Return what to predict with when draws are asked for: the best known, or the posterior as it is.

        The threshold stays only if draws are recommended, since it belongs to the recommended prediction.
        """
        if not self.is_mean:
            return self
        point = self.draws or DrawsPoint(tau=1.0)
        return replace(self, tau=point.tau, rule=DecisionRule(point.temperature, by_length=self.rule.by_length))

    @property
    def is_mean(self) -> bool:
        """Whether the mean is what to predict with, pruned or not."""
        return math.isinf(self.tau)

    def describe(self) -> str:
        """Return what to predict with in words: "the mean with T 1.31"."""
        text, threshold = describe(self.tau, self.ratio, self.rule.temperature), self.rule.threshold
        return text if threshold is None else f"{text}, abstaining below confidence {threshold:.3g}"


def recommended_for(adapter: str | os.PathLike[str] | Adapter, path: str | Path | None = None) -> Recommended | None:
    """Return what to predict with for an adapter: what the recommended.json in its own folder says, None without one.

    This is the one rule for all commands and for `predict`. Nothing but the folder is read; the Hub is asked only where
    `adapter` is a Hub id. The adapter must be that of the recommendation, or made of it by `temper` and `prune`, whose
    τ is not applied twice.

    Args:
        adapter: its folder, its Hub id, or the `Adapter` itself.
        path: of another recommended.json, in place of the adapter's own.

    Raises:
        IVONError: the adapter or the file cannot be read, or the file belongs to another adapter. It is never ignored.
    """
    held = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    record = recommended_in(held) if path is None else recommended_from(Path(path), held)
    if record is None:
        return None
    file = held.folder / RECOMMENDED_FILE if path is None else Path(path)
    is_mean = math.isinf(posterior_number(held.metadata, "tau"))
    return _recommended(record, file, lambda tau: tau_on_top(record, held.metadata, tau), is_mean)


def recommended_for_members(path: str | Path) -> Recommended:
    """Return what a recommended.json means for members that are drawn and pruned already.

    Raises:
        IVONError: the file cannot be read, or is no recommendation.
    """
    record = Recommendation.load(path, "recommended")
    taken = _recommended(record, Path(path), lambda tau: math.inf if math.isinf(tau) else 1.0)
    return replace(taken, ratio=0.0)


def _recommended(
    record: Recommendation, path: Path, on_top: Callable[[float], float], is_mean: bool = False
) -> Recommended:
    draws = record.draws
    if math.isfinite(record.tau):
        draws = DrawsPoint(tau=record.tau, temperature=record.temperature)
    if draws is not None:
        draws = None if is_mean else draws.model_copy(update={"tau": on_top(draws.tau)})
    if math.isinf(record.tau) and not record.ratio:
        mean_temperature = record.temperature
    else:
        scaled = (point.temperature for point in record.scaled if math.isinf(point.tau) and not point.ratio)
        mean_temperature = next(scaled, 1.0)
    rule = DecisionRule(**{field.name: getattr(record, field.name) for field in fields(DecisionRule)})
    return Recommended(path, on_top(record.tau), record.ratio, rule, draws, mean_temperature)
