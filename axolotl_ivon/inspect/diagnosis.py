"""Diagnose a finished run: whether the weights moved, whether σ was learned, and what to do next."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ..posterior.chain import PRIOR_SHA256
from ..posterior.findings import Finding, begins_at_zero, findings
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter
from ..storage.format import header_number

# Σ σ²/var(A) over the matrices A: the paper's runs have 20 to 80.
NARROW, WIDE = 5.0, 500.0
# Nats that a draw may cost an example; the λ that `auto` takes allows 0.4.
COSTLY = 1.0


def diagnose(path_or_hub_id: str | os.PathLike[str], reporter: Reporter = SILENT) -> dict[str, Any]:
    """Diagnose the run that made an adapter; return plain numbers, strings, lists and dicts.

    `moved` and `allowed` are from the header: the average distance that a weight of a B matrix moved, and the largest
    that the learning rate allowed, Σ α_t·ξ. Without both `moved` is the mean of |B|, which begins at 0.
    `log_sigma_spread` is the standard deviation of log σ within a tensor, averaged over tensors by their weights.
    `noise` is D = Σ σ²/var(A) over the matrices A, at var(A) = 1/(3·inputs), PEFT's start. Each is None if unknown.
    `findings` are dicts of `about`, `good` and `text`.

    Raises:
        IVONError: the folder holds no posterior, or its files do not belong together.
    """
    q = Posterior.from_pretrained(path_or_hub_id, reporter)
    moved, allowed = header_number(q.metadata, "moved"), header_number(q.metadata, "travel")
    count, spread, noise, b_sum, b_count = 0, 0.0, 0.0, 0.0, 0
    for key in q.mean:
        sigma = q.sigma.raw(key)
        drawn = sigma > 0
        if begins_at_zero(key):
            b_sum += float(np.abs(q.mean.float32(key)).sum(dtype=np.float64))
            b_count += sigma.size
        if n := int(np.count_nonzero(drawn)):
            spread += n * float(np.log(sigma[drawn]).std(dtype=np.float64))
            count += n
            if ".lora_A" in key and sigma.ndim:
                largest = sigma.max()  # whose square may be too large for float32
                mean_square = float(np.square(sigma / largest).mean(dtype=np.float64)) * float(largest) ** 2
                noise += 3 * sigma.shape[-1] * mean_square
        reporter.advance("measuring", sigma.size, q.mean.weights)
    if moved is None and allowed is None:  # a run that began elsewhere, and could not know where, has `travel` alone
        moved = b_sum / b_count if b_count else None
    steps, beta2 = header_number(q.metadata, "steps"), header_number(q.metadata, "beta2")
    log_spread, inherited = spread / count if count else None, PRIOR_SHA256 in q.metadata
    run_findings = findings(moved, allowed, log_spread, int(steps or 0), beta2, inherited=inherited)
    if not count:
        run_findings.append(Finding("draws", False, "σ is 0 everywhere: there is only the mean, and no draws"))
    elif q.metadata.get("hessian") in ("squared_gradients", "fisher") and (ess := header_number(q.metadata, "ess")):
        # Σ h·σ²/2, the expected rise of the loss, is at most this, as σ² = 1/(λ·p) and p ≥ h.
        cost = count / (2 * ess * q.tau)
        text = f"a draw raises the loss of an example by at most about {cost:.2g} nats"
        text += ", which may destroy what the model knows; a larger λ or τ narrows the draws" if cost > COSTLY else ""
        if q.training_tau > 1 and q.tau > 1 and noise < NARROW:  # rightly, in a short run
            text += f"; training narrowed the draws by τ {q.training_tau:g}, so they hardly differ from the mean: a "
            text += f"further τ of {1 / q.tau:.3g} undoes all narrowing"
        run_findings.append(Finding("draws", cost <= COSTLY, text))
    elif noise:
        text = f"the draws disturb the model by D = {noise:.2g}, where 20 to 80 is usual"
        text += ": they hardly differ from the mean; a smaller λ or τ widens them" if noise < NARROW else ""
        text += ": they may destroy it; a larger λ or τ narrows them" if noise > WIDE else ""
        run_findings.append(Finding("draws", NARROW <= noise <= WIDE, text))
    return {
        "adapter": str(path_or_hub_id),
        "moved": moved,
        "allowed": allowed,
        "log_sigma_spread": log_spread,
        "noise": noise or None,
        "steps": steps and int(steps),
        "beta2": beta2,
        "ess": header_number(q.metadata, "ess"),
        "train_size": header_number(q.metadata, "train_size"),
        "tau": "inf" if math.isinf(q.tau) else q.tau,
        "pruned_ratio": q.pruned_ratio,
        "findings": [finding._asdict() for finding in run_findings],
    }
