"""What is evaluated of a trained run: the rows of the tables.

A row is a function of (model, posterior, task, examples, number of draws, argument, ensemble) that returns
`Predictions` for the examples and the facts to note. What a row chooses, it chooses on the validation data. The
ensemble is [function that reads a run's posterior, its runs…].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from axolotl_ivon import Posterior
from axolotl_ivon.metrics.calibration import (
    added_by_a_temperature,
    fit_temperature,
    logs_of,
    nll_at_temperatures,
    probable_temperature,
)
from axolotl_ivon.metrics.choice import choose
from axolotl_ivon.metrics.scores import Scores, metrics

from .data import Encoder, Example, Task, labels_of
from .methods import (
    Predictions,
    fit_laplace,
    fit_sigma,
    predict_at,
    predict_dropout,
    predict_laplace,
    predict_posterior,
)

Answer = tuple[Predictions, dict[str, Any]]
RATIO = 0.1  # the paper's share of pruned weights
TEMPERATURES, RATIOS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0), (0.0, 0.1)


def score(predictions: Predictions, examples: Sequence[Example]) -> dict[str, float | None]:
    """Return the metrics of predictions, as `ivon-post eval` computes them."""
    return metrics(Scores.of(predictions.probabilities, labels_of(examples), predictions.expected_entropy))


_DRAWN: dict[tuple[int, float, int], tuple[Posterior, Sequence[Example], Predictions]] = {}


def drawn(model: Encoder, q: Posterior, examples: Sequence[Example], draws: int, tau: float = 1.0) -> Predictions:
    """Return the average over draws at τ; at ∞ it is the mean. All rows of a run have them once."""
    if any(run is not q for run, _, _ in _DRAWN.values()):
        _DRAWN.clear()
    place = id(examples), tau, draws
    if place not in _DRAWN:
        at, count = (q.temper(tau), draws) if math.isfinite(tau) else (q, 0)
        _DRAWN[place] = q, examples, predict_posterior(model, at, examples, count)
    return _DRAWN[place][2]


def mean(model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any) -> Answer:
    """The prediction at the mean; for AdamW, at its weights."""
    return drawn(model, q, examples, draws, math.inf), {}


def posterior(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, argument: str, *_: Any
) -> Answer:
    """The average over draws, or over another number of them."""
    return drawn(model, q, examples, int(argument or draws)), {}


def mean_pruned(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, argument: str, *_: Any
) -> Answer:
    """At the mean, pruned: 10 % by SNR, or `criterion,ratio`."""
    criterion, ratio = argument.partition(",")[::2]
    return predict_posterior(model, q.prune(float(ratio or RATIO), criterion or "snr"), examples, 0), {}


def posterior_pruned(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any
) -> Answer:
    """The average over draws, pruned."""
    return predict_posterior(model, q.prune(RATIO), examples, draws), {}


def tempered(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, argument: str, *_: Any
) -> Answer:
    """The average over draws at the temperature τ given."""
    return drawn(model, q, examples, draws, float(argument)), {}


def reshaped(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, argument: str, *_: Any
) -> Answer:
    """The average over draws whose σ was permuted within each tensor, or made constant there at the same mean of σ².

    The temperature is the best of some on the validation data, since a permutation alone adds noise where the model is
    sensitive; `as-is` shows the σ that was learned, at its own best one.
    """
    generator = torch.Generator().manual_seed(0)
    sigma = dict(q.sigma)
    for name, value in sigma.items():
        if argument == "permuted":
            sigma[name] = value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
        elif argument == "constant":
            sigma[name] = torch.full_like(value, float(value.square().mean().sqrt()))
    changed = Posterior(dict(q.mean), sigma, {}, {})

    def loss(tau: float) -> float:
        found = predict_posterior(model, changed.temper(tau), task.validation, draws)
        return float(score(found, task.validation)["nll"] or 0)

    tau = min((0.5, 1.0, 2.0, 4.0), key=loss)
    return predict_posterior(model, changed.temper(tau), examples, draws), {"tau": tau}


def recommended(model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any) -> Answer:
    """The average over draws at the τ, and then the pruning ratio, with the lowest validation NLL."""

    @cache
    def loss(point: tuple[float, float]) -> float:
        tau, ratio = point
        found = predict_posterior(model, q.prune(ratio).temper(tau), task.validation, draws)
        return float(score(found, task.validation)["nll"] or 0)

    tau = min(TEMPERATURES, key=lambda tau: loss((tau, 0.0)))
    ratio = min(RATIOS, key=lambda ratio: loss((tau, ratio)))
    found = predict_posterior(model, q.prune(ratio).temper(tau), examples, draws)
    return found, {"tau": tau, "ratio": ratio}


def temperature_scaling(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any
) -> Answer:
    """The weights themselves, logits divided by the temperature that fits the validation data best."""
    return _scaled(model, q, task, examples, draws, math.inf)


def posterior_scaled(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any
) -> Answer:
    """The average over draws, its log-probabilities divided by the temperature that fits the validation data best."""
    return _scaled(model, q, task, examples, draws, 1.0)


def _scaled(model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, tau: float) -> Answer:
    held_out = drawn(model, q, task.validation, draws, tau).probabilities
    temperature = fit_temperature(held_out, labels_of(task.validation))
    logits = drawn(model, q, examples, draws, tau).probabilities.log()
    return Predictions.of([logits / temperature]), {"temperature": temperature}


def calibrated(model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any) -> Answer:
    """What the end of training recommends: the mean as it is, or at the T that fits the validation data.

    By the rule of `ivon_calibrate`, which tries draws as well where they cost a tenth of the training's time at most:
    in none of the runs that this row is evaluated of.
    """
    labels, held = labels_of(task.validation), drawn(model, q, task.validation, draws, math.inf).probabilities

    own = math.inf, probable_temperature(held, labels)
    losses = nll_at_temperatures(logs_of(held), labels[:, None]).squeeze(1)
    crossed = added_by_a_temperature(losses.numpy())
    costs = {own: 0.0, (math.inf, 1.0): 1.0}.__getitem__
    tau, temperature = choose((math.inf, 1.0), [own], [], costs, lambda *_: "", crossed).recommended
    logits = drawn(model, q, examples, draws, tau).probabilities.log() / temperature
    return Predictions.of([logits]), {"tau": tau, "temperature": temperature}


def mc_dropout(model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, *_: Any) -> Answer:
    """The average over passes with dropout."""
    return predict_dropout(model, examples, draws), {}


def laplace(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, argument: str, *_: Any
) -> Answer:
    """Laplace-LoRA with the Hessian's structure given."""
    fitted = fit_laplace(model, task, argument)
    found = predict_laplace(fitted, examples)
    for value in model.peft.parameters():
        value.grad = None
    return found, {"prior_precision": float(fitted.prior_precision.mean())}


def fitted(
    model: Encoder, q: Posterior, task: Task, examples: Sequence[Example], draws: int, argument: str, *_: Any
) -> Answer:
    """The average over draws with the σ that `ivon-post fit` gives the weights: by ivon, fisher or tfb.

    With `METHOD,validated` λ is the one of some with the lowest validation NLL, and with `METHOD,scaled` the log of the
    average is divided by the temperature that fits the validation data best.
    """
    method, option = argument.partition(",")[::2]
    found, facts = _fitted(model, q, task, method, option == "validated", draws)
    facts = {**facts, **rank_correlations(q, found)}
    if option == "scaled":
        return posterior_scaled(model, found, task, examples, draws)[0], facts
    return predict_posterior(model, found, examples, draws), facts


def rank_correlations(one: Posterior, other: Posterior) -> dict[str, float]:
    """Return Spearman's correlation of two σ, over all weights and within tensors (averaged by weights).

    Tensors where either has none are left out.

    Within a tensor alone the levels that its prior sets do not count.
    """
    from scipy.stats import spearmanr

    pairs = [(one.sigma[key].flatten(), other.sigma[key].flatten()) for key in one.sigma]
    pairs = [(a, b) for a, b in pairs if (a > 0).any() and (b > 0).any()]
    if not pairs:
        return {}
    within = [(float(spearmanr(a, b).statistic), len(a)) for a, b in pairs]
    whole = spearmanr(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])).statistic
    mean = sum(value * size for value, size in within) / sum(size for _, size in within)
    return {"rank_correlation": float(whole), "rank_correlation_within_tensors": mean}


_FITS: dict[tuple[str, bool], tuple[Posterior, tuple[Posterior, dict[str, Any]]]] = {}  # with the run that it is of


def _fitted(
    model: Encoder, q: Posterior, task: Task, method: str, validated: bool, draws: int
) -> tuple[Posterior, dict[str, Any]]:
    """Fit once for all rows of a run."""
    if any(run is not q for run, _ in _FITS.values()):
        _FITS.clear()
    if (method, validated) not in _FITS:
        _FITS[method, validated] = q, fit_sigma(model, task, method, validated, draws, seed=0)
    return _FITS[method, validated][1]


def ensemble(
    model: Encoder,
    q: Posterior,
    task: Task,
    examples: Sequence[Example],
    draws: int,
    argument: str,
    members: Sequence[Any],
) -> Answer:
    """The average over the runs of all seeds."""
    read, *runs = members
    return predict_at(model, (dict(read(run).mean) for run in runs), examples), {"members": len(runs)}


ROWS: dict[str, Callable[..., Answer]] = {
    "mean": mean,
    "posterior": posterior,
    "mean-pruned": mean_pruned,
    "posterior-pruned": posterior_pruned,
    "tau": tempered,
    "recommended": recommended,
    "sigma": reshaped,
    "temperature-scaling": temperature_scaling,
    "posterior-scaled": posterior_scaled,
    "calibrated": calibrated,
    "mc-dropout": mc_dropout,
    "laplace": laplace,
    "fit": fitted,
    "ensemble": ensemble,
}
