"""Accuracy, calibration and uncertainty of predictions: functions of a few numbers for each, its `Scores`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .auroc import auroc
from .selective import RiskCoverage, adaptive_calibration_error

# Name -> number of bins of equal width. Ten is the first that the tables show, fifteen is torchmetrics' default.
ECE_BINS = {"ece": 10, "ece15": 15}
RISK, COVERAGE = 0.05, 0.8  # of cov_at_5risk and risk_at_80cov


@dataclass(frozen=True)
class Scores:
    """What the metrics need of n predictions: float64 tensors of shape (n,), and `group`, int64, likewise.

    `group` numbers the example that a prediction belongs to: one for a choice, one per token for generation.
    Predictions of one example are dependent, so the bootstrap draws examples. Entropies are in nats. `expected_entropy`
    is NaN where draws do not say it. `variance` is Σ_c Var_k p_k(c) over draws k: the Brier score's share of their
    disagreement, as the mutual information is the entropy's. `probabilities` (n, classes) are kept where there are few
    classes.
    """

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    variance: Tensor
    group: Tensor
    probabilities: Tensor | None = None

    @classmethod
    def of(
        cls,
        probabilities: Tensor,
        target: Tensor,
        expected_entropy: Tensor | None = None,
        group: Tensor | None = None,
        variance: Tensor | None = None,
        keep: bool = False,
    ) -> Scores:
        """Score predictive distributions (n, classes), averaged over draws or not.

        `target` (n,), int64, is the right class of each. `expected_entropy` (n,) is the mean over draws of each
        draw's entropy; without draws it is the entropy. `variance` (n,) is 0 without draws. The Brier score is the sum
        over classes, Σ_c (p_c − y_c)², between 0 and 2. `keep` keeps the probabilities.
        """
        right = probabilities.gather(1, target[:, None]).squeeze(1)
        confidence, guess = probabilities.max(dim=1)
        uncertainty = entropy(probabilities)
        columns = {
            "confidence": confidence,
            "correct": guess == target,
            "nll": -right.clamp_min(torch.finfo(right.dtype).tiny).log(),
            "brier": probabilities.square().sum(1) - 2 * right + 1,
            "entropy": uncertainty,
            "expected_entropy": uncertainty if expected_entropy is None else expected_entropy,
            "variance": torch.zeros_like(right) if variance is None else variance,
        }
        count = torch.arange(len(target)) if group is None else group.cpu()
        kept = probabilities.double().cpu() if keep else None
        return cls(**{k: column.double().cpu() for k, column in columns.items()}, group=count, probabilities=kept)

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """Join scores end to end."""
        columns: dict[str, Any] = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        columns = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
        return cls(**columns)

    def where(self, chosen: Tensor) -> Scores:
        """Return the scores at `chosen`: places, or a mask (n,)."""
        columns: dict[str, Any] = {k: None if column is None else column[chosen] for k, column in vars(self).items()}
        return Scores(**columns)

    def of_groups(self, groups: Tensor) -> Scores:
        """Return the scores of the examples numbered in `groups` only."""
        return self.where(torch.isin(self.group, groups))

    def mean_of_groups(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (n,) over the predictions of each example, in the examples' order."""
        _, group = torch.unique(self.group, return_inverse=True)
        return torch.bincount(group, weights=values) / torch.bincount(group)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats of distributions (…, classes), shape (…); 0·log 0 is 0."""
    return torch.special.entr(probabilities).sum(-1)


def metrics(scores: Scores) -> dict[str, float | None]:
    """Return the metrics of one row; None where one has no value.

    accuracy, ece, ece15 (expected calibration error of the top label, 10 and 15 equal bins), aece (10 bins with equally
    many predictions), nll (nats), perplexity, brier, auroc (of the confidence, for being right; None if all are right
    or all wrong), and for draws the split of the predictive entropy: entropy = expected_entropy (noise in the data) +
    mutual_information (the draws disagree).

    When only the most confident are answered (`selective.RiskCoverage`): aurc, augrc, cov_at_5risk (the largest share
    with at most 5 % errors; None if there is none) and risk_at_80cov (the share of errors among the first 80 %).
    """
    values = weighted_metrics(scores, torch.ones(1, len(scores.group), dtype=torch.float64))
    return {name: None if value.isnan() else value.item() for name, value in values.items()}


def weighted_metrics(scores: Scores, weights: Tensor) -> dict[str, Tensor]:
    """Return every metric of `metrics`, shape (resamples,), under `weights` (resamples, n): how often each counts.

    Every metric is computed for all resamples at once, where a call for each would take seconds a row. NaN where a
    metric has no value.
    """
    total = weights.sum(1)

    def mean(name: str) -> Tensor:
        return weights @ getattr(scores, name) / total

    gap = weights * (scores.correct - scores.confidence)
    errors = {}
    for name, bins in ECE_BINS.items():
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        bin_of = torch.bucketize(scores.confidence.clamp(0, 1), edges, right=True) - 1
        errors[name] = gap.new_zeros(len(gap), bins + 1).index_add_(1, bin_of, gap).abs().sum(1) / total
    nll, total_entropy, noise = mean("nll"), mean("entropy"), mean("expected_entropy")
    confidence, correct, times = scores.confidence.numpy(), scores.correct.numpy(), weights.numpy()
    selective = RiskCoverage(confidence, 1 - correct, times)
    ranked = {
        "aece": adaptive_calibration_error(confidence, correct, weights=times),
        "auroc": auroc(confidence, correct, times),
        "aurc": selective.aurc(),
        "augrc": selective.augrc(),
        "cov_at_5risk": selective.coverage_at(RISK),
        "risk_at_80cov": selective.risk_at(COVERAGE),
    }
    return {
        "accuracy": mean("correct"),
        **errors,
        "nll": nll,
        "perplexity": nll.exp(),
        "brier": mean("brier"),
        **{name: torch.from_numpy(value) for name, value in ranked.items()},
        "entropy": total_entropy,
        "expected_entropy": noise,
        "mutual_information": total_entropy - noise,
    }
