"""The problem that a method solves: settings, and an adapter in memory with its data.

A method is a module of this room, which states its formula and its paper, with `fit(problem) -> FittedSigma`.

Importing this module imports no torch: a wrong setting is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..evaluation.evaluate import Sampling, evaluate
from ..evaluation.variants import Variant
from ..posterior.adapter import UNPRUNED, Adapter, posterior_number
from ..posterior.posterior import Posterior
from ..reporter import Reporter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models.session import Session
    from .state import State

METHODS = ("fisher", "ivon", "tfb")  # each a module of this room; the first is the default


@dataclass(frozen=True)
class Settings:
    """What is fitted, and how; an IVONError where a value is out of range, or does not go with the method."""

    # "fisher": the Fisher information at the mean in one pass; "ivon": IVON's updates of the precision at draws;
    # "tfb": the widest noise on A within a tolerance. Each is a module beside this one.
    method: Literal["fisher", "ivon", "tfb"] = "fisher"
    empirical: bool = False  # take the labels of the data, not labels drawn from the model
    ess: float | None = None  # λ; None for that of `ivon_preset: auto` for as many examples
    prior: Literal["empirical"] | float = "empirical"  # as in `IVONLoRA`, as is its strength
    prior_strength: float = 1.0
    # A data file. fisher and ivon choose λ on it, from 1/64 to 64 times the default, by the NLL of averaged draws; tfb
    # finds the width on it, by default on the training data.
    validation: str | None = None
    tolerance: float | None = None  # the NLL of averaged draws there may be this many nats above that of the mean
    samples: int = 10  # draws that are averaged
    seed: int = 0  # of all that is random
    limit: int | None = None  # use only the first examples of each file
    task: str | None = None  # how validation data are predicted, as for `ivon-post eval`; so are its choices
    choices: Sequence[str] | None = None
    batch_size: int | None = None  # examples in a batch; None: as many as fit

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise IVONError(f"{param_ref('method')} {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        tfb = self.method == "tfb"
        for name in ("empirical", "ess", "prior", "prior_strength") if tfb else ("tolerance",):  # of other methods
            value = getattr(self, name)
            if value != getattr(type(self), name):
                reason = f"it is for {param_ref('method')} tfb"
                if tfb:
                    reason = f"the width of {param_ref('method')} tfb is found by {param_ref('tolerance')} alone"
                shown = "" if value is True else f" {value}"
                raise IVONError(f"{param_ref(name)}{shown}: {reason}; leave it out")
        if self.ess is not None and self.validation is not None:
            raise IVONError(
                f"{param_ref('ess')} {self.ess:g}: {param_ref('validation')} chooses it; leave one of them out"
            )
        for name, least, fix in (
            ("ess", 0, "give a number > 0"),
            ("prior_strength", 0, "give a number > 0; 1 is the KL-optimal prior"),
            ("tolerance", 0, "give nats > 0"),
            ("samples", 1, "give a number of draws"),
            ("limit", 1, "give a number of examples"),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least and value > 0):
                raise IVONError(f"{param_ref(name)} {value:g}: {fix}")
        fixed = isinstance(self.prior, (int, float)) and math.isfinite(self.prior) and self.prior > 0
        if self.prior != "empirical" and not fixed:
            raise IVONError(f"{param_ref('prior')} {self.prior!r}: give empirical, or a number > 0")


class HeldOut(NamedTuple):
    """Data on which the predictions of a candidate for σ are evaluated: files, task, tokenised examples."""

    paths: Sequence[str]
    task: str
    items: Sequence[EncodedExample]


@dataclass(frozen=True)
class FitProblem:
    """What a method is given."""

    adapter: Adapter  # whose mean stays
    session: Session  # the adapter over its base model in memory; the model can be differentiated
    parameters: Mapping[str, nn.Parameter]  # those that get a σ, by name
    settings: Settings
    items: Sequence[EncodedExample]  # the training examples
    held_out: HeldOut | None  # where the settings ask for evaluation
    state: State  # the file of an interrupted fit
    header: Mapping[str, str]  # what all methods write into it
    reporter: Reporter

    def posterior(self, fitted: FittedSigma) -> Posterior:
        """Return the posterior with this σ; a tensor that is saved without being trained has σ = 0."""
        import torch

        adapter, sigma = self.adapter, fitted.sigma
        names = {parameter: name for name, parameter in self.parameters.items()}
        values: dict[str, Tensor] = {}
        first: dict[str, str] = {}  # of the keys under which a shared parameter was saved
        aliases: dict[str, str] = {}
        for key, (_, shape) in sorted(adapter.mean.specs.items()):
            name = names.get(self.session.slots.places.get(key))  # type: ignore[arg-type]
            values[key] = torch.zeros(shape) if name is None or name not in sigma else sigma[name].float().cpu()
            if name is not None and first.setdefault(name, key) != key:
                aliases[key] = first[name]
        before, old = adapter.metadata, adapter.sigma
        if old is not None and posterior_number(before, "pruned_ratio"):
            for key, value in values.items():  # what was pruned stays so
                pruned = (old.raw(key) == 0) & (adapter.mean.float32(key) == 0)
                value[torch.from_numpy(np.ascontiguousarray(pruned))] = 0
        kept = {name: before[name] for name in ("pruned_ratio", UNPRUNED, "moved", "travel") if name in before}
        return Posterior(
            adapter.mean,
            values,
            {"tau": "1.0", "pruned_ratio": "0.0", **kept, **self.header, **fitted.header},
            adapter.config,
            folder=adapter.folder,
            mean_metadata=adapter.mean_metadata,
            aliases=aliases,
            known_fingerprint=self.header["mean_sha256"],
        )

    def nll(self, posterior: Posterior, tau: float, reporter: Reporter) -> float:
        """Return the mean NLL on the held-out data: of averaged draws at τ, or at τ = ∞ of the mean.

        The draws are the same for every posterior. The reporter hears how many examples are done.
        """
        assert self.held_out is not None
        variants, (_, task, items) = [Variant("posterior", tau=tau)], self.held_out
        sampling = Sampling(self.settings.samples, self.settings.seed, self.settings.batch_size)
        [scores] = evaluate(self.session.model, posterior, items, variants, task, sampling, reporter)
        value = float(scores.nll.mean())
        return value if math.isfinite(value) else math.inf


class FittedSigma(NamedTuple):
    """The result of a method: σ by parameter, float32 (0 of one that is left out), and its facts for the header."""

    sigma: Mapping[str, Tensor]
    header: Mapping[str, str] = {}
