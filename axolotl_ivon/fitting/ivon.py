"""IVON's updates of the precision with the mean held: the variational σ around an existing adapter.

Each step draws θ = m + σ·ε and takes the Fisher information of a batch there (`fisher`), whose running average is h:

    h ← h + ρ_t·(ĥ − h),  ρ_t = 2/(t+1)                 weights that grow with t: early draws are soon forgotten
    p = h + δ,  σ = 1/√(λ·p)                            δ: the prior's part, at its fixed point (`precision`)

It ends at 1/σ² = λ·(E_q[F(θ)] + δ). For a Gaussian q the stationary point of the variational objective has the Hessian
E_q[∇²ℓ(θ)] in the place of the Fisher information (arXiv 2402.17641); the two are equal where the loss is that of a
Gaussian or of an exponential family's natural parameters that are linear in θ, and else F is its generalized
Gauss-Newton part, which is not negative. IVON's own estimate ĝ·(θ−m)/σ² has the Hessian as its mean, but a hundred
times the noise; that of training by `squared_gradients`, B·ĝ² of a batch, has E_q[g²] + (B−1)·E_q[g]² with labels of
the data: the gradient of a batch does not vanish at a draw, and that of an example is small where its label was
learned by heart. Gradients of single examples, as for labels that the model draws, have neither, at the same cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import param_ref
from ..models.batching import Batches
from ..noise import normals
from ..settings.presets import PRESETS
from .fisher import Squares, squaring
from .precision import Prior, choose_ess, first_prior, fitted
from .problem import FitProblem, FittedSigma
from .state import Snapshot

_T = TypeVar("_T")
SETTLED = 0.1  # root mean square of the change of log σ since half as many steps
FEWEST, MOST = 32, 4096  # steps
CHECKPOINTS = {round(2 ** (k / 2)) for k in range(25)}  # after which σ is compared: 1, 2, 3, 4, 6, 8, 11, 16, … MOST


@dataclass(frozen=True)
class Averages:
    """Where the iteration is: all that is needed to continue it."""

    step: int = 0  # t, steps so far
    average: dict[str, Tensor] = field(default_factory=dict)  # of the squares, with weights that grow with t
    losses: float = 0.0  # likewise, the number of losses of a step
    earlier: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # p at the last two checkpoints, by t
    change: float | None = None  # root mean square of the change of log σ since half as many steps; None at the start
    deltas: Mapping[str, float] = field(default_factory=dict)  # δ by parameter, of the last checkpoint

    @property
    def settled(self) -> bool:
        """Say whether σ has settled: its change since the halfway point is within noise."""
        return self.step >= FEWEST and self.change is not None and self.change <= SETTLED

    def information(self) -> dict[str, Tensor]:
        """Return h by parameter."""
        return {name: value / self.losses for name, value in self.average.items()}

    def kept(self) -> Snapshot:
        """Return what a file keeps of it."""
        tensors = {f"average/{name}": value for name, value in self.average.items()}
        for step, precision in self.earlier.items():
            tensors |= {f"{step}/{name}": value for name, value in precision.items()}
        values = {"step": self.step, "losses": self.losses, "change": self.change, "deltas": dict(self.deltas)}
        return Snapshot(tensors, values)

    @classmethod
    def restored(cls, kept: Snapshot, device: torch.device) -> Averages:
        """Return what `kept` has kept."""
        groups: dict[str, dict[str, Tensor]] = {"average": {}}
        for key, value in kept.tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = value.to(device)
        average = groups.pop("average")
        earlier = {int(step): precision for step, precision in sorted(groups.items(), key=lambda item: int(item[0]))}
        values = kept.values
        return cls(values["step"], average, values["losses"], earlier, values["change"], values["deltas"])


def iterate(
    parameters: Mapping[str, nn.Parameter],
    square: Callable[[_T], Squares],
    batches: Iterator[_T],
    prior: Prior,
    start: Mapping[str, Tensor] | float,
    progress: Averages,
    seed: int = 0,
) -> Iterator[Averages]:
    """Continue from `progress` and yield it after every step, until σ has settled.

    The parameters hold the mean whenever it yields, and afterwards, whatever happens. Draw t depends on the seed, t
    and the parameter's name alone. `start` is h of the first draw, by parameter or of all weights.
    """
    means = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def information(name: str) -> Tensor:
        if progress.step:
            return progress.average[name] / progress.losses
        return torch.full_like(means[name], start, dtype=torch.float32) if isinstance(start, float) else start[name]

    def deltas() -> dict[str, float]:
        return {name: prior.delta(information(name), mean) for name, mean in means.items()}

    priors = progress.deltas or deltas()
    while not progress.settled and progress.step < MOST:
        step = progress.step + 1
        try:
            with torch.no_grad():
                for name, mean in means.items():
                    noise = torch.from_numpy(normals(mean.numel(), "fit", seed, step, name)).view(mean.shape)
                    sigma = prior.sigma(information(name), priors[name])
                    parameters[name].copy_(mean + sigma * noise.to(mean.device))
            squares = square(next(batches))
        finally:
            with torch.no_grad():
                for name, mean in means.items():
                    parameters[name].copy_(mean)
        progress = _averaged(progress, squares, means)
        if step in CHECKPOINTS:
            priors = deltas()
            precision = {name: prior.precision(information(name), delta) for name, delta in priors.items()}
            progress = replace(_compared(progress, precision), deltas=priors)
        yield progress


def _averaged(progress: Averages, squares: Squares, means: Mapping[str, Tensor]) -> Averages:
    """Return the averages with those of one more step."""
    share = 2 / (progress.step + 2)
    average = {}
    for name, mean in means.items():
        new = squares.total[name] if name in squares.total else torch.zeros_like(mean, dtype=torch.float32)
        average[name] = torch.lerp(progress.average[name], new, share) if progress.step else new.clone()
    losses = progress.losses + share * (squares.losses - progress.losses)
    return replace(progress, step=progress.step + 1, average=average, losses=losses)


def _compared(progress: Averages, precision: dict[str, Tensor]) -> Averages:
    """Compare the precision with that of half as many steps, which is two checkpoints back."""
    earlier, change = dict(progress.earlier), progress.change
    if len(earlier) == 2:
        old = earlier.pop(min(earlier))
        weights = sum(value.numel() for value in old.values())
        squares = sum(float((value / old[name]).log_().square_().sum()) for name, value in precision.items())
        change = (squares / weights) ** 0.5 / 2
    return replace(progress, earlier={**earlier, progress.step: precision}, change=change)


def fit(problem: FitProblem) -> FittedSigma:
    """Return σ at h of draws once it has settled; with validation data at that λ first, then at the one they choose."""
    prior = first_prior(problem)
    fan_ins = [value.shape[-1] for name, value in problem.parameters.items() if ".lora_A." in name]
    start: Mapping[str, Tensor] | float = PRESETS["auto"].first_h0(prior.ess, fan_ins)
    progress, first, steps = Averages(), 0, 0
    if kept := problem.state.read():
        progress, first = Averages.restored(kept, problem.session.device), kept.values["stage"]
        prior, steps = prior._replace(ess=kept.values["ess"]), kept.values["earlier_steps"]
    stages = 2 if problem.settings.validation else 1
    for stage in range(first, stages):
        at = {"stage": stage, "ess": prior.ess, "earlier_steps": steps}
        progress = _settle(problem, progress, prior, start, at)
        steps += progress.step
        information = progress.information()
        if stage + 1 < stages:
            prior, start, progress = choose_ess(problem, information, prior), information, Averages()
    return fitted(problem, information, prior, steps)


def _settle(
    problem: FitProblem,
    progress: Averages,
    prior: Prior,
    start: Mapping[str, Tensor] | float,
    at: Mapping[str, float],
) -> Averages:
    """Continue from `progress` until σ has settled; `at` is kept beside it, for `fit` to continue there."""
    settings, reporter, session = problem.settings, problem.reporter, problem.session

    def snapshot() -> Snapshot:
        kept = progress.kept()
        return Snapshot(kept.tensors, {**kept.values, **at})

    batches = Batches(problem.items, settings.batch_size, session.device.type, session.classes)
    advance = reporter.begin("fitting σ" if not at["stage"] else "fitting σ at the λ chosen")
    advance(progress.step)
    with squaring(problem) as square, problem.state.kept(snapshot):
        numbered = enumerate(itertools.islice(batches.endless(settings.seed), progress.step, None), progress.step)
        shown = progress.change
        steps = iterate(
            problem.parameters, lambda batch: square(*batch), numbered, prior, start, progress, settings.seed
        )
        for progress in steps:
            advance(1)
            if progress.change != shown and progress.step >= 8:
                shown = progress.change
                reporter.say(
                    f"{progress.step} steps: σ changed by {shown:.1%} since half as many (settled at {SETTLED:.0%})"
                )
            problem.state.keep(snapshot)
    if settings.validation:
        problem.state.write(snapshot())
    if not progress.settled:
        reporter.notify(
            f"σ has not settled after {MOST:,} steps: it still changes by {progress.change or 0:.1%}; "
            f"{param_ref('method')} fisher needs no steps"
        )
    return progress
