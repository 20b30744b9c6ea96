"""Which weights to prune: scores, and the exact choice of the lowest among hundreds of millions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ..errors import IVONError, param_ref
from ..hookspecs import Criterion
from ..noise import generator
from ..plugins import plugin_manager
from ..reporter import SILENT, Reporter
from .tensors import Tensors, in_threads

SCOPES = ("adapter", "tensor")


def snr(name: str, mean: np.ndarray, sigma: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """|m|/σ, the signal-to-noise ratio (arXiv 2506.14280): infinite where a weight has no noise."""
    scores = np.abs(mean)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # 0/0 is a pruned weight
        scores /= sigma
    return scores


def largest_sigma(name: str, mean: np.ndarray, sigma: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """−σ: the most uncertain weights go first, as in an earlier version of arXiv 2506.14280."""
    return -sigma


def magnitude(name: str, mean: np.ndarray, sigma: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """|m|, which needs no posterior: the baseline."""
    return np.abs(mean)


def at_random(name: str, mean: np.ndarray, sigma: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Uniform in [0, 1): the control."""
    return random.random(mean.shape, np.float32)


CRITERIA: dict[str, Criterion] = {"snr": snr, "sigma": largest_sigma, "magnitude": magnitude, "random": at_random}


# The score of a weight depends on its own mean and σ alone: some weights can be scored without the others.
_ELEMENTWISE = (snr, largest_sigma, magnitude)


def criteria() -> dict[str, Criterion]:
    """Return every criterion by name: those that ship and those of installed extensions."""
    return {name: score for more in plugin_manager().hook.pruning_criteria() for name, score in more.items()}


@dataclass(frozen=True)
class Pruning:
    """How many weights to prune, and which go first.

    Attributes:
        ratio: the share of all weights that is 0 afterwards; more are if more were pruned before.
        criterion: the name of a score; the weights with the smallest go first.
        scope: "adapter" (ranked over all tensors) or "tensor" (the same share of each).
        seed: seed of what a criterion draws.

    Raises:
        IVONError: a ratio outside [0, 1], an unknown criterion or scope.
    """

    ratio: float
    criterion: str = "snr"
    scope: str = SCOPES[0]
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise IVONError(f"{param_ref('ratio')} {self.ratio} is outside [0, 1]; 0.1 prunes a tenth of the weights")
        for name, value, known in (("criterion", self.criterion, criteria()), ("scope", self.scope, SCOPES)):
            if value not in known:
                raise IVONError(f"{param_ref(name)} {value!r} is unknown; choose one of {', '.join(known)}")


def pruning_masks(
    mean: Tensors,
    sigma: Tensors,
    pruning: Pruning,
    aliases: Mapping[str, str] = MappingProxyType({}),
    reporter: Reporter = SILENT,
) -> dict[str, tuple[np.ndarray, int]]:
    """Return, per tensor, the weights to prune as packed bits (np.packbits), and how many are 0 afterwards.

    Which those are, `Posterior.prune` says. `aliases` has name -> first name of tensors that were saved twice: the copy
    is pruned where the first one is.

    Raises:
        IVONError: scores are NaN or of another shape, or σ is 0 everywhere.
    """
    criterion = pruning.criterion
    score = criteria()[criterion]

    def scores(key: str, step: int = 1) -> np.ndarray:
        """Return the scores of a tensor, or of every `step`th of its weights."""
        m, s = mean.float32(key), sigma.raw(key)
        if score in _ELEMENTWISE:
            m, s, step = m.reshape(-1)[::step], s.reshape(-1)[::step], 1
        random = generator("prune", pruning.seed, key)
        values = np.asarray(score(key, m, s, random), np.float32)
        if values.shape != m.shape:
            raise IVONError(f"criterion {criterion!r} gave shape {values.shape} for {key}")
        pruned = (s == 0) & (m == 0) if s.min() == 0 else None
        if pruned is not None:
            values = np.where(pruned, np.float32(0), values)
        if not values.min() > -np.inf:
            raise IVONError(f"criterion {criterion!r} gave NaN or minus infinity for {key}")
        if pruned is not None:
            values[pruned] = -np.inf
        return values.reshape(-1)[::step]

    def takes_part(key: str) -> bool:
        if not mean.size(key):
            return False
        return bool(sigma.raw(key).any() or not mean.raw(key).any())

    taking = mean.each(takes_part, "reading", reporter)
    keys = sorted(key for key in taking if taking[key] and key not in aliases)
    if not keys and pruning.ratio > 0:
        raise IVONError("σ is 0 everywhere, so no weight is less certain than another; prune before tau inf")
    total = sum(map(mean.size, keys))

    def done(key: str) -> None:
        reporter.advance("ranking", mean.size(key), total)

    marked: dict[str, tuple[np.ndarray, int]] = {}
    for group in [keys] if pruning.scope == "adapter" else [[key] for key in keys]:
        weights = sum(map(mean.size, group))
        if count := round(pruning.ratio * weights):
            marked.update(_lowest(group, scores, count, weights, done))
    return marked | {copy: marked[first] for copy, first in aliases.items() if first in marked}


def _lowest(
    keys: list[str], scores: Callable[..., np.ndarray], count: int, weights: int, done: Callable[[str], None]
) -> Iterator[tuple[str, tuple[np.ndarray, int]]]:
    """Choose the `count` ≥ 1 smallest scores of tensors that have `weights` in all: yield what `pruning_masks` returns.

    A sample gives two bounds between which the threshold lies, to six standard errors. One pass marks the scores below
    both and keeps those between, which are then partitioned. If the sample has misled, a second pass keeps them all.
    """
    # A prime step, or the sample would be one column of a matrix whose width divides it.
    step = 61 if weights > 2**22 else 1
    sample = np.sort(np.concatenate(list(in_threads(lambda key: scores(key, step).copy(), keys))))
    middle, spread = count / step, 6 * math.sqrt(count / step) + 10
    first, last = max(0, int(middle - spread)), min(len(sample) - 1, int(middle + spread))
    for low, high in ((sample[first], sample[last]), (-np.inf, np.inf)):

        def split(
            key: str, low: float = low, high: float = high
        ) -> tuple[np.ndarray, int, int, np.ndarray, np.ndarray]:
            values = scores(key)
            under = values < low
            near = np.flatnonzero(~under & (values <= high))
            counts = int(np.count_nonzero(under)), int(np.count_nonzero(values == -np.inf))
            return np.packbits(under), *counts, near.astype(np.uint32), values[near]

        parts = {}
        for key, part in zip(keys, in_threads(split, keys), strict=True):
            parts[key] = part
            done(key)
        left = count - sum(under for _, under, *_ in parts.values())
        between = np.concatenate([values for *_, values in parts.values()])
        if 0 < left <= len(between):
            break
    between.partition(left - 1)
    threshold = between[left - 1]
    left -= int(np.count_nonzero(between < threshold))
    for key in keys:
        under, _, gone, near, values = parts.pop(key)
        ties = near[values == threshold][:left]  # more may be equal than are left to prune: the first ones go
        left -= len(ties)
        mask = np.unpackbits(under)
        mask[near[values < threshold]] = 1
        mask[ties] = 1
        # Those that were pruned before have the smallest scores: all of them are chosen again, or nothing else is.
        yield key, (np.packbits(mask), max(int(np.count_nonzero(mask)), gone))
