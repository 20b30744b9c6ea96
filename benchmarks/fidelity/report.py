"""The tables and pictures of the fidelity suite, from its results alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .run import Record, ablation_jobs, chosen, run_key, settings_of

Values = list[float]
METRICS = {"accuracy": ("accuracy", 100.0, 1), "ece": ("ECE", 100.0, 1), "nll": ("NLL", 1.0, 3)}
ROW_NAMES = {
    ("adamw", "mean"): "AdamW",
    ("adamw", "temperature-scaling"): "AdamW + temperature scaling",
    ("adamw-stopped", "mean"): "AdamW, stopped early",
    ("adamw-stopped", "temperature-scaling"): "AdamW, stopped early + temperature scaling",
    ("adamw", "mc-dropout"): "AdamW + MC dropout, {draws} passes",
    ("adamw", "ensemble"): "LoRA ensemble of 5 (5 × the training)",
    ("adamw", "laplace=diag"): "Laplace-LoRA, diagonal",
    ("adamw", "laplace=kron"): "Laplace-LoRA, KFAC",
    ("adamw", "laplace=last_layer"): "Laplace, last layer",
    ("blob", "mean"): "BLoB, mean",
    ("blob", "posterior"): "BLoB, {draws} draws",
    ("ivon-opt", "mean"): "ivon-opt (fixed prior), mean",
    ("ivon-opt", "posterior"): "ivon-opt (fixed prior), {draws} draws",
    ("ivon-lora", "mean"): "**IVON-LoRA, mean**",
    ("ivon-lora", "mean-pruned"): "IVON-LoRA, mean, 10 % pruned",
    ("ivon-lora", "posterior"): "**IVON-LoRA, 10 draws**",
    ("ivon-lora", "posterior-pruned"): "IVON-LoRA, 10 draws, 10 % pruned",
    ("ivon-lora", "recommended"): "IVON-LoRA, 10 draws, τ and pruning by validation",
    ("ivon-lora", "temperature-scaling"): "IVON-LoRA, mean + temperature scaling",
    ("ivon-lora", "posterior-scaled"): "IVON-LoRA, 10 draws + temperature scaling",
    ("ivon-lora-h0", "mean"): "**IVON-LoRA, h0 0.5, mean**",
    ("ivon-lora-h0", "posterior"): "**IVON-LoRA, h0 0.5, 10 draws**",
    ("ivon-lora-h0", "recommended"): "IVON-LoRA, h0 0.5, 10 draws, τ and pruning by validation",
    ("ivon-lora-rate", "mean"): "**IVON-LoRA, λ = 10·N, mean**",
    ("ivon-lora-rate", "posterior"): "**IVON-LoRA, λ = 10·N, 10 draws**",
    ("ivon-lora-rate", "recommended"): "IVON-LoRA, λ = 10·N, 10 draws, τ and pruning by validation",
    ("ivon-lora-rate", "temperature-scaling"): "IVON-LoRA, λ = 10·N, mean + temperature scaling",
    ("ivon-lora-rate", "posterior-scaled"): "IVON-LoRA, λ = 10·N, 10 draws + temperature scaling",
    ("ivon-lora-preset", "mean"): "**IVON-LoRA, preset of 0.2.0, mean**",
    ("ivon-lora-preset", "posterior"): "**IVON-LoRA, preset of 0.2.0, 10 draws**",
    ("ivon-paper", "mean"): "the paper's algorithm, λ = 10·N, mean",
    ("ivon-paper", "posterior"): "the paper's algorithm, λ = 10·N, {draws} draws",
    ("ivon-adam", "mean"): "**IVON-LoRA, mean**",
    ("ivon-adam", "posterior"): "**IVON-LoRA, {draws} draws**",
    ("ivon-adam", "temperature-scaling"): "IVON-LoRA, mean + temperature scaling",
    ("ivon-adam", "posterior-scaled"): "IVON-LoRA, {draws} draws + temperature scaling",
    ("ivon-adam", "calibrated"): "**IVON-LoRA, as the end of training recommends**",
    ("ivon-far", "mean"): "IVON-LoRA by signs, travel 0.125, mean",
    **{
        (method, row): f"IVON-LoRA by signs, {name}"
        for method in ("ivon-auto", "ivon-signs")
        for row, name in {
            "mean": "mean",
            "posterior": "{draws} draws",
            "temperature-scaling": "mean + temperature scaling",
            "posterior-scaled": "{draws} draws + temperature scaling",
            "calibrated": "as the end of training recommends",
        }.items()
    },
}
OURS = (
    "ivon-adam",
    "ivon-auto",
    "ivon-signs",
    "ivon-paper",
    "ivon-lora",
    "ivon-lora-h0",
    "ivon-lora-rate",
    "ivon-lora-preset",
)
SHIFTED = (
    ("adamw", "mean"),
    ("blob", "posterior"),
    *((method, row) for method in OURS for row in ("mean", "posterior")),
)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error over seeds; the error of a single value is NaN."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def cell(values: Sequence[float], metric: str) -> str:
    """Format mean ± standard error of one metric; "–" without values."""
    if not values:
        return "–"
    _, scale, digits = METRICS[metric]
    mean, error = mean_and_error(values)
    spread = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Results:
    """The records of a suite, found by method, row, task, data set and seed."""

    def __init__(self, suite: Mapping[str, Any], records: list[Record]) -> None:
        self.suite, self.records = suite, records
        self.index = {(r["run"], r["row"], r["data"]): r for r in records}

    def find(
        self, task: str, method: str, row: str, data: str = "test", choose_by: str | float = "nll"
    ) -> dict[int, Record]:
        """Return seed -> record of a method's row, at the learning rate chosen by `choose_by`."""
        value = chosen(self.suite, task, method, self.records, choose_by)
        if value is None:
            return {}
        [name] = self.suite["methods"][method]["grid"]
        runs = {
            seed: run_key(settings_of(self.suite, task, method, seed, **{name: value})) for seed in self.suite["seeds"]
        }
        found = {seed: self.index.get((run, row, data)) for seed, run in runs.items()}
        return {seed: record for seed, record in found.items() if record}

    def values(self, metric: str, *where: Any, **options: Any) -> dict[int, float]:
        """Return seed -> value of a metric."""
        return {seed: record["metrics"][metric] for seed, record in self.find(*where, **options).items()}

    def tasks(self) -> list[str]:
        """Return the tasks on which AdamW and IVON-LoRA have run with at least two seeds."""
        ours = [method for method in OURS if method in self.suite["methods"]]
        return [
            task
            for task in self.suite["tasks"]
            if len(self.find(task, "adamw", "mean")) > 1
            and any(len(self.find(task, method, "posterior")) > 1 for method in ours)
        ]


def label_of(results: Results, method: str, row: str, by: str | float) -> str:
    """Return what a line of a table is called."""
    name = ROW_NAMES[method, row].format(draws=results.suite["draws"])
    if by == "usual":  # where the preset is left to itself
        return name.replace("IVON-LoRA", "IVON-LoRA, untuned", 1)
    return name if by == "nll" else f"{name}, rate by {by}" if isinstance(by, str) else f"{name}, rate {rate_text(by)}"


def rate_text(rate: float) -> str:
    """Return a learning rate as it is written in a YAML: 5e-4."""
    return f"{rate:.0e}".replace("e-0", "e-")


def lines_of(results: Results) -> list[tuple[str, str, str | float]]:
    """Return (method, row, what its rate was chosen by) of what the tables show: of a given rate, one row."""
    methods = results.suite["methods"]
    return [
        (method, row, by)
        for method, row in ROW_NAMES
        if method in methods
        for by in methods[method].get("choose_by", ["nll"])
        if isinstance(by, str) or row == methods[method]["select"]
    ]


def main_table(results: Results) -> str:
    """Accuracy, ECE and NLL of every method and row, task by task and on average over tasks."""
    tasks, parts, lines = results.tasks(), [], lines_of(results)
    for metric, (name, scale, _) in METRICS.items():
        rows = []
        for method, row, by in lines:
            found = [results.values(metric, task, method, row, choose_by=by) for task in tasks]
            if not any(found):
                continue
            label = label_of(results, method, row, by)
            seeds = set.intersection(*(set(values) for values in found))
            average = [statistics.fmean(values[seed] for values in found) for seed in sorted(seeds)]
            rows.append([label, *(cell(list(values.values()), metric) for values in found), cell(average, metric)])
        heads = [f"{name}{' (%)' if scale == 100 else ''}", *tasks, "average"]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def verdict_table(results: Results) -> str:
    """What must show: IVON-LoRA against AdamW, paired by seed, averaged over tasks."""
    rows = []
    compared = [method for method in OURS if method in results.suite["methods"]]
    for method, by in itertools.product(compared, results.suite["methods"]["adamw"].get("choose_by", ["nll"])):
        for metric, row in (("nll", "posterior"), ("ece", "posterior"), ("accuracy", "mean")):
            pairs = []
            for task in results.tasks():
                ours = results.values(metric, task, method, row)
                theirs = results.values(metric, task, "adamw", "mean", choose_by=by)
                pairs.append({seed: (ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()})
            seeds = sorted(set.intersection(*(set(pair) for pair in pairs))) if pairs else []
            ours_mean = [statistics.fmean(pair[seed][0] for pair in pairs) for seed in seeds]
            theirs_mean = [statistics.fmean(pair[seed][1] for pair in pairs) for seed in seeds]
            if not seeds:
                continue
            if metric == "accuracy":
                difference, error = mean_and_error([a - b for a, b in zip(ours_mean, theirs_mean, strict=True)])
                text, holds = f"{100 * difference:+.1f} ± {100 * error:.1f} points", difference >= 0
            else:
                # Whether ours − 0.6·theirs is below 0 by more than two standard errors.
                margin, error = mean_and_error([a - 0.6 * b for a, b in zip(ours_mean, theirs_mean, strict=True)])
                ratio = statistics.fmean(ours_mean) / statistics.fmean(theirs_mean)
                text, holds = f"{ratio:.2f} of AdamW's", margin + 2 * error < 0
            rows.append([
                f"{label_of(results, method, row, 'nll').replace('*', '')}: {METRICS[metric][0]}",
                f"validation {METRICS[by][0]}" if isinstance(by, str) else f"{by:g}",
                cell(ours_mean, metric), cell(theirs_mean, metric), text, "yes" if holds else "no",
            ])  # fmt: skip
    return table(["", "AdamW's rate", "IVON-LoRA", "AdamW", "comparison", "holds"], rows)


def shift_table(results: Results) -> str:
    """NLL, ECE and accuracy on the other domains of the movie tasks."""
    rows = []
    domains = results.suite["domains"]
    for task in results.tasks():
        if not results.suite["tasks"][task].get("shifted"):
            continue
        for method, row in SHIFTED:
            if method not in results.suite["methods"]:
                continue
            for by in results.suite["methods"][method].get("choose_by", ["nll"]):
                cells = []
                for domain in domains:
                    found = results.find(task, method, row, domain, by)
                    values = {m: [r["metrics"][m] for r in found.values()] for m in METRICS}
                    cells.append(" / ".join(cell(values[m], m) for m in METRICS) if found else "–")
                if any(text != "–" for text in cells):
                    label = label_of(results, method, row, by)
                    rows.append([task, label, *cells])
    return table(["task", "accuracy (%) / ECE (%) / NLL", *domains], rows) if rows else "Not run."


def choice_table(results: Results) -> str:
    """The grid of every method: NLL and accuracy on validation data, seed 0, and what was chosen."""
    rows = []
    for task in results.tasks():
        for method, spec in results.suite["methods"].items():
            [(name, values)] = spec["grid"].items()
            cells = []
            for value in values:
                run = run_key(settings_of(results.suite, task, method, 0, **{name: value}))
                record = results.index.get((run, spec["select"], "validation"))
                metrics = record["metrics"] if record else None
                cells.append(f"{value:g}: {metrics['nll']:.2f}, {100 * metrics['accuracy']:.1f} %" if metrics else "–")
            if any(text != "–" for text in cells):
                rows.append([task, f"{method}, {name}", *cells])
    return table(["task", "method", "validation NLL, accuracy", "", ""], rows)


def cost_table(results: Results) -> str:
    """CPU seconds and optimizer state of each method, per task."""
    rows = []
    for method in results.suite["methods"]:
        cells, state = [], "–"
        for task in results.tasks():
            spec = results.suite["methods"][method]
            found = results.find(task, method, spec["rows"][0])
            if found:
                cells.append(f"{statistics.fmean(r['facts']['train_seconds'] for r in found.values()):.0f}")
                state = f"{next(iter(found.values()))['facts']['state_mb']:.2f}"
            else:
                cells.append("–")
        rows.append([method, state, *cells])
    return table(["", "state (MiB)", *(f"{task} (s)" for task in results.tasks())], rows)


def ablation_table(results: Results, name: str) -> str:
    """One ablation: every variant at its rows."""
    spec = results.suite["ablations"][name]
    rows: list[list[str]] = []
    shown: set[str] = set()
    for variant in spec["variants"]:
        jobs = ablation_jobs(
            {**results.suite, "ablations": {name: {**spec, "variants": [variant]}}}, name, results.records
        )
        for row in spec["rows"]:
            found = [r for job in jobs if (r := results.index.get((job.key, row, "test")))]
            if found:
                values = {m: [r["metrics"][m] for r in found] for m in METRICS}
                label = ", ".join(f"{key} {value}" for key, value in variant.items()) or "default"
                shown.add(label)
                rows.append([label, row, str(len(found)), *(cell(values[m], m) for m in METRICS)])
    heads = [f"{name} ({spec['task']}, {spec['method']})", "row", "seeds", "accuracy (%)", "ECE (%)", "NLL"]
    # The default alone, which other tables have, compares nothing.
    compares = len(shown) > 1 or len(spec["variants"]) == len(shown)
    return table(heads, rows) if compares else "Not run."


# -------------------------------------------------------------------- pictures


def scatter(results: Results) -> Figure:
    """Draw accuracy against ECE and NLL of every row, one line of panels for each task."""
    tasks = results.tasks()
    figure = Figure(figsize=(10, 3.2 * len(tasks)), layout="constrained")
    colors = {
        "adamw": "#9a9a9a",
        "blob": "#d55e00",
        "ivon-opt": "#e69f00",
        "ivon-lora": "#0072b2",
        "ivon-lora-h0": "#009e73",
        "ivon-lora-rate": "#cc79a7",
        "ivon-lora-preset": "#56b4e9",
    }
    panels = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    for task, axes in zip(tasks, panels, strict=True):
        for (method, row, by), marker in zip(lines_of(results), itertools.cycle("os^vDP*Xsph<>d8"), strict=False):
            found = {metric: results.values(metric, task, method, row, choose_by=by) for metric in METRICS}
            if not found["nll"]:
                continue
            point = {metric: METRICS[metric][1] * statistics.fmean(found[metric].values()) for metric in METRICS}
            for axis, metric in zip(axes, ("ece", "nll"), strict=True):
                axis.plot(
                    point[metric], point["accuracy"], marker, color=colors.get(method), markersize=8,
                    label=label_of(results, method, row, by).replace("*", ""),
                )  # fmt: skip
        axes[0].set_ylabel(f"{task}: accuracy (%)")
        for axis in axes:
            axis.grid(alpha=0.3)
    for axis, label in zip(panels[-1], ("ECE (%), 10 bins", "NLL (nats)"), strict=True):
        axis.set_xlabel(label + ": left is better")
    handles, labels = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right", fontsize=8, frameon=False)  # type: ignore[call-overload]
    return figure


def curves(
    results: Results, name: str, axis_label: str, key: Callable[[str], tuple[str, float] | None]
) -> Figure | None:
    """Draw accuracy and NLL over a number that `key` reads from a row's name, one curve for each label it gives."""
    spec = results.suite["ablations"].get(name)
    if spec is None:
        return None
    lines: dict[str, dict[float, dict[str, Values]]] = {}
    for job in ablation_jobs(results.suite, name, results.records):
        for row in spec["rows"]:
            record, place = results.index.get((job.key, row, "test")), key(row)
            if record and place:
                at = lines.setdefault(place[0], {}).setdefault(place[1], {m: [] for m in METRICS})
                for metric in METRICS:
                    at[metric].append(record["metrics"][metric])
    if not lines:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (metric, (label, scale, _)) in zip(figure.subplots(1, 3), METRICS.items(), strict=True):
        for line, points in lines.items():
            places = sorted(points)
            pairs = [mean_and_error(points[x][metric]) for x in places]
            axis.errorbar(
                places, [scale * m for m, _ in pairs], [0 if math.isnan(e) else scale * e for _, e in pairs],
                marker="o", markersize=4, capsize=2, label=line,
            )  # fmt: skip
        axis.set_xlabel(axis_label)
        axis.set_ylabel(label + (" (%)" if scale == 100 else ""))
        axis.grid(alpha=0.3)
        if axis_label.startswith("temperature"):
            axis.set_xscale("log", base=2)
    figure.axes[0].legend(fontsize=8)
    return figure


def _pruned(row: str) -> tuple[str, float] | None:
    if row == "mean":
        return None
    criterion, _, ratio = row.removeprefix("mean-pruned=").partition(",")
    return (criterion, float(ratio)) if row.startswith("mean-pruned=") else None


def _tempered(row: str) -> tuple[str, float] | None:
    if row == "posterior":
        return ("10 draws", 1.0)
    return ("10 draws", float(row[4:])) if row.startswith("tau=") else None


def report(suite: Mapping[str, Any], records: list[Record], pictures: Path) -> str:
    """Return the tables as Markdown and write the pictures (PNG)."""
    results = Results(suite, records)
    if not results.tasks():
        return "No task has results of both AdamW and IVON-LoRA yet."
    parts = [
        "### What must show", verdict_table(results),
        "### All methods", main_table(results),
        "### Shifted domains", shift_table(results),
        "### The grids", choice_table(results),
        "### Cost of training", cost_table(results),
    ]  # fmt: skip
    for name in suite.get("ablations", {}):
        parts += [f"### Ablation: {name}", ablation_table(results, name)]
    pictures.mkdir(parents=True, exist_ok=True)
    figures = {
        "methods": scatter(results),
        "pruning": curves(results, "pruning", "share of weights pruned", _pruned),
        "temperature": curves(results, "temperature", "temperature τ", _tempered),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(pictures / f"fidelity-{name}.png", dpi=110)
    return "\n\n".join(parts)
