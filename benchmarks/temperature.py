"""Rules for the softmax temperature of a mean, from few examples: what each gains, and loses where none is needed.

    python -m benchmarks.temperature predict causal causal-linear short    # runs whose weights are in the work folder
    python -m benchmarks.temperature table --examples 60 120 200

`predict` keeps the mean's probabilities of a run's validation and test examples. `table` draws examples from them at
random, applies every rule, and measures NLL on the rest: of the runs as they are, of the same divided by the T that
fits all examples, which needs none, and of those made 1.2 times too sure.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from axolotl_ivon.metrics.calibration import (
    PENALTIES,
    TEMPERATURE_GRID,
    added_by_a_temperature,
    fit_temperature,
    logs_of,
    nll_at_temperatures,
)
from axolotl_ivon.metrics.choice import PAYS, cross_validated

from .fidelity.data import labels_of
from .fidelity.report import table
from .fidelity.rows import drawn
from .fidelity.run import Places, _read_task, run_key, settings_of, trained

EXPERIMENTS = Path(__file__).with_name("fidelity") / "experiments.yaml"
ONE = TEMPERATURE_GRID.index(1.0)
NONE = np.zeros(len(TEMPERATURE_GRID))


def halves(losses: np.ndarray) -> float:
    """Return what the T of one half adds to the loss on the other, averaged over both halves of ten random splits."""
    rng, added = np.random.default_rng(0), []
    for _ in range(10):
        order = rng.permutation(len(losses))
        parts = losses[order[: len(order) // 2]], losses[order[len(order) // 2 :]]
        added += [other[:, one.sum(0).argmin()].mean() - other[:, ONE].mean() for one, other in (parts, parts[::-1])]
    return float(np.mean(added))


def gated(losses: np.ndarray, penalties: np.ndarray, takes: bool) -> int:
    """Return the number of the T with the least loss plus penalty, or that of 1."""
    return int((losses.sum(0) + penalties).argmin()) if takes else ONE


# The number of a T, from losses (examples, T).
RULES: Mapping[str, Callable[[np.ndarray], int]] = {
    "never": lambda losses: ONE,
    "always": lambda losses: gated(losses, NONE, True),
    "always, with the prior": lambda losses: gated(losses, PENALTIES, True),
    "where ten random halves say so": lambda losses: gated(losses, NONE, halves(losses) <= -5e-4),
    "where each left out says so": lambda losses: gated(losses, NONE, cross_validated(losses, NONE, ONE) <= -PAYS),
    "… with the prior: the rule": lambda losses: gated(losses, PENALTIES, added_by_a_temperature(losses) <= -PAYS),
}


def runs(suites: list[str], places: Callable[[Mapping[str, Any]], Places], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield a name, and (task, settings, places), of every run of the default and by signs that was trained here."""
    plans = yaml.safe_load(file.read_text(encoding="utf-8"))["suites"]
    for name in suites:
        suite = plans[name]
        place = places(suite)
        for method in ("ivon-adam", "ivon-auto", "ivon-signs"):
            [(grid, values)] = suite["methods"].get(method, {"grid": {"": ()}})["grid"].items()
            for task in suite["tasks"]:
                for value in values:
                    for seed in suite["seeds"]:
                        settings = settings_of(suite, task, method, seed, **{grid: value})
                        if (place.work / "runs" / f"{run_key(settings)}.safetensors").is_file():
                            yield f"{name}, {task}, {method}, {value}, {seed}", (task, settings, place)


def predict(arguments: argparse.Namespace) -> None:
    """Write the mean's probabilities and what is right, of all runs that have none yet."""
    arguments.out.mkdir(parents=True, exist_ok=True)

    def places(suite: Mapping[str, Any]) -> Places:
        return Places(arguments.work, None, Path(), "", 0, json.dumps(suite["tasks"], sort_keys=True))

    for name, (task, settings, place) in runs(arguments.suites, places, arguments.experiments):
        path = arguments.out / f"{run_key(settings)}.pt"
        if path.exists():
            continue
        data, (model, posterior, _) = _read_task(task, json.loads(settings), place), trained(task, settings, place)
        examples = [*data.validation, *data.test]
        torch.save((drawn(model, posterior, examples, 1, math.inf).probabilities, labels_of(examples)), path)
        print(name, flush=True)


def measure(logs: Tensor, target: Tensor, examples: int, splits: int) -> dict[str, float]:
    """Return the NLL by each rule, averaged over random splits."""
    losses = nll_at_temperatures(logs, target[:, None]).squeeze(1).numpy()
    rng, found = np.random.default_rng(0), dict.fromkeys(RULES, 0.0)
    for _ in range(splits):
        order = rng.permutation(len(losses))
        for name, rule in RULES.items():
            found[name] += float(losses[order[examples:], rule(losses[order[:examples]])].mean()) / splits
    return found


def compare(arguments: argparse.Namespace) -> None:
    """Print the table."""
    rows: dict[str, list[str]] = {name: [] for name in RULES}
    kept = [torch.load(path) for path in sorted(arguments.out.glob("*.pt"))]
    for examples in arguments.examples:
        for sharpness in (None, 1.0, 1.2):
            differences: dict[str, list[float]] = {name: [] for name in RULES}
            for probabilities, target in kept:
                logs = logs_of(probabilities.double())
                if sharpness:
                    logs = logs * sharpness / fit_temperature(probabilities.double(), target)
                own = measure(logs, target, examples, arguments.splits)
                for name, value in own.items():
                    differences[name].append(value - own["never"])
            for name, values in differences.items():
                rows[name].append(f"{1000 * np.mean(values):+.1f}")
    heads = [f"{n} {kind}" for n in arguments.examples for kind in ("as they are", "calibrated", "1.2 times too sure")]
    print(f"NLL above that without a T, in thousandths, of {len(kept)} runs\n")
    print(table(["rule", *heads], [[name, *values] for name, values in rows.items()]))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    predicts, tables = commands.add_parser("predict"), commands.add_parser("table")
    predicts.add_argument("suites", nargs="+")
    predicts.add_argument("--work", type=Path, default=Path(".demo/fidelity"))
    predicts.add_argument("--experiments", type=Path, default=EXPERIMENTS)
    predicts.set_defaults(run=predict)
    tables.add_argument("--examples", type=int, nargs="+", default=[60, 120, 200])
    tables.add_argument("--splits", type=int, default=10)
    tables.set_defaults(run=compare)
    for command in (predicts, tables):
        command.add_argument("--out", type=Path, default=Path(".demo/temperature"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
