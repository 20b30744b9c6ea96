"""The ways to predict that an evaluation compares: base model, mean, posterior, and more. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import IVONError, param_ref
from ..posterior.posterior import check_tau
from ..posterior.prune import Pruning
from . import ADDED_VARIANTS, PAPER_VARIANTS


@dataclass(frozen=True)
class Variant:
    """A way to predict: with the base model, or with the posterior at temperature τ after pruning.

    Attributes:
        tau: `math.inf` is the mean, one pass; anything else the average over draws.
        ratio: the share of weights that is pruned.
        temperature: the log-probabilities of the result are divided by it.
        threshold: the confidence from which on an example is answered; None: always.
        score: what that confidence is (`decisions.recommendation.DecisionRule`).

    Raises:
        IVONError: τ is not > 0, or the ratio is outside [0, 1].
    """

    name: str
    tau: float = math.inf
    ratio: float = 0.0
    base: bool = False
    temperature: float = 1.0
    threshold: float | None = None
    score: str = "probability"

    def __post_init__(self) -> None:
        check_tau(self.tau)
        Pruning(self.ratio)

    @property
    def needs_sigma(self) -> bool:
        """Whether the variant takes more of a posterior than its mean."""
        return not self.base and (self.ratio > 0 or math.isfinite(self.tau))

    def passes(self, samples: int) -> int:
        """Return how many passes over the data the variant takes."""
        return 1 if self.base or math.isinf(self.tau) else samples

    @property
    def source(self) -> Variant:
        """What the predictions are made from: variants with the same source share its passes."""
        return replace(self, name="", temperature=1.0, threshold=None, score="probability")


def paper_variants(tau: float = 1.0, ratio: float = 0.1) -> dict[str, Variant]:
    """Return the five variants of the paper's tables 1 and 2, by name."""
    how = [{"base": True}, {}, {"ratio": ratio}, {"tau": tau}, {"tau": tau, "ratio": ratio}]
    return {name: Variant(name, **fields) for name, fields in zip(PAPER_VARIANTS, how, strict=True)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class VariantChoice:
    """Which variants are evaluated: those of `paper_variants` that are named, and those that a recommendation adds.

    By default they are base, mean and posterior, and with a ratio the pruned ones too.
    """

    names: Sequence[str] = ()
    tau: float = 1.0
    ratio: float = 0.0
    added: Sequence[Variant] = ()

    def variants(self) -> list[Variant]:
        """Return the variants in the order of `paper_variants`, and then what is added.

        Raises:
            IVONError: there is no variant of some name.
        """
        known = paper_variants(self.tau, self.ratio)
        there = [*known, *(variant.name for variant in self.added)]
        for name in self.names:
            if name not in there:
                given = f"{param_ref('rows')} {','.join(self.names)}: {name!r}"
                if name in ADDED_VARIANTS:
                    raise IVONError(f"{given} takes a recommendation that has it; choose from {','.join(there)}")
                raise IVONError(f"{given} is unknown; choose from {','.join((*PAPER_VARIANTS, *ADDED_VARIANTS))}")
        names = self.names or [name for name, variant in known.items() if self.ratio or "pruned" not in name]
        return [*(variant for name, variant in known.items() if name in names), *self.added]
