"""What a program writes into README.md and RESULTS.md: tables and pictures of a suite, from its results alone.

A table stands in a page between two comments, `<!-- table: SUITE PART -->` and `<!-- end of table -->`; a part that
compares suites takes several, `SUITE,SUITE`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from .report import METRICS, OURS, ROW_NAMES, Results, cell, label_of, lines_of, mean_and_error, table
from .run import Job, Record, ablation_jobs

PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
MOVIE = "movie-256"  # the task of the ablations, which is evaluated on other domains too
PRESET = ("ivon-adam", "usual")  # the untuned preset, and by what its rate is chosen


class Baseline(NamedTuple):
    """What the untuned preset is compared with, and what is wanted of its mean.

    Attributes:
        name: what it is called.
        row: the row of AdamW.
        rates: by what its learning rate is chosen; over several the metric is averaged.
        nll, ece: the largest share of the baseline's that is wanted.
        errors: by how many standard errors the NLL has to be below that; −1: it may be one above.
    """

    name: str
    row: str
    rates: Sequence[str | float]
    nll: float
    ece: float | None
    errors: int


BASELINES = (
    Baseline("AdamW at 2e-4 and 5e-4, the paper's", "mean", (2.0e-4, 5.0e-4), 0.7, 0.5, 0),
    Baseline("AdamW, rate by validation", "mean", ("nll",), 0.95, 0.8, 2),
    Baseline("AdamW, rate by validation + temperature scaling", "temperature-scaling", ("nll",), 1.0, None, -1),
)


def name_of(results: Results, method: str, row: str, by: str | float) -> str:
    """Return what a line is called here, where it is said in any case how a rate was chosen."""
    name = label_of(results, method, row, by)
    chosen = {"adamw": "AdamW", "ivon-adam": "IVON-LoRA"}.get(method, "") if by == "nll" else ""
    return name.replace(chosen, f"{chosen}, rate by validation", 1) if chosen else name


def averaged(results: Results, metric: str, method: str, row: str, by: str | float = "nll") -> dict[int, float]:
    """Return seed -> a metric averaged over the tasks, of the seeds that every task has."""
    return _over_tasks(results, metric, results.tasks(), method, row, "test", by)


def _over_tasks(
    results: Results, metric: str, tasks: Sequence[str], method: str, row: str, data: str, by: str | float = "nll"
) -> dict[int, float]:
    found = [results.values(metric, task, method, row, data, by) for task in tasks]
    seeds = set.intersection(*(set(values) for values in found)) if found else set()
    return {seed: statistics.fmean(values[seed] for values in found) for seed in sorted(seeds)}


def headline(results: Results) -> str:
    """AdamW and the untuned preset, averaged over the tasks."""
    lines = lines_of(results)
    return _summary(results, [line for line in lines if line[0] == "adamw" or (line[0], line[2]) == PRESET])


def summary(results: Results) -> str:
    """Every method and row, averaged over the tasks."""
    return _summary(results, lines_of(results))


def _summary(results: Results, lines: Sequence[tuple[str, str, str | float]]) -> str:
    rows = []
    for method, row, by in lines:
        found = {metric: list(averaged(results, metric, method, row, by).values()) for metric in METRICS}
        if found["nll"]:
            rows.append([name_of(results, method, row, by), *(cell(found[metric], metric) for metric in METRICS)])
    return table(["", "accuracy, %", "ECE, %", "NLL"], rows)


def promises(results: Results) -> str:
    """What is wanted of the untuned preset, against three baselines; paired by seed, averaged over the tasks."""
    rows = []
    for baseline in BASELINES:
        for metric in ("accuracy", "nll", "ece"):
            mine = averaged(results, metric, PRESET[0], "mean", PRESET[1])
            theirs = [averaged(results, metric, "adamw", baseline.row, by) for by in baseline.rates]
            seeds = [seed for seed in mine if all(seed in values for values in theirs)]
            if not seeds:
                continue
            other = {seed: statistics.fmean(values[seed] for values in theirs) for seed in seeds}
            if metric == "accuracy":
                difference, error = mean_and_error([mine[seed] - other[seed] for seed in seeds])
                found, holds = f"{100 * difference:+.1f} ± {100 * error:.1f} points", difference + error >= 0
                wanted = "not below by more than one standard error"
            else:
                factor = baseline.nll if metric == "nll" else baseline.ece
                if factor is None:
                    continue
                errors = baseline.errors if metric == "nll" else 0
                margin, error = mean_and_error([mine[seed] - factor * other[seed] for seed in seeds])
                share = statistics.fmean(mine[seed] for seed in seeds) / statistics.fmean(other.values())
                found, holds = f"{share:.2f}", margin + errors * error <= 0
                wanted = f"≤ {factor:g}" + {0: "", 2: ", by two standard errors"}.get(
                    errors, ", or one standard error above"
                )
            rows.append([baseline.name, METRICS[metric][0], wanted, found, "yes" if holds else "no"])
    return table(["against", "", "wanted", "found", "holds"], rows)


def tasks(results: Results) -> str:
    """Accuracy, ECE and NLL task by task."""
    columns = [(results, task) for task in results.tasks()]
    lines = [(name_of(results, *line), line) for line in lines_of(results)]
    return _by_task(columns, [task for _, task in columns], lines)


def stage(*suites: Results) -> str:
    """Accuracy, ECE and NLL task by task of several models, also of one seed; a column says how often data are seen."""
    columns = [
        (results, task)
        for results in suites
        for task in results.suite["tasks"]
        if any(
            results.find(task, method, "mean", choose_by=by)
            for method in OURS
            if method in results.suite["methods"]
            for by in results.suite["methods"][method].get("choose_by", ["nll"])
        )
    ]
    heads = []
    for results, task in columns:
        suite = results.suite
        epochs = suite["steps"] * suite["batch"] / suite["tasks"][task]["train"]
        heads.append(f"{suite.get('model', 'MiniLM').partition('-Instruct')[0]}, {task}, {epochs:.0f} epochs")
    methods = suites[0].suite["methods"]
    lines = []
    for method, row in ROW_NAMES:
        for by in methods.get(method, {}).get("choose_by", ["nll"] if method in methods else []):
            chosen = by == "nll" and "lr" in methods[method]["grid"]
            name = label_of(suites[0], method, row, by) + ", rate by validation" * chosen
            lines.append((name, (method, row, by)))
    return _by_task(columns, heads, lines)


def _by_task(
    columns: Sequence[tuple[Results, str]],
    heads: Sequence[str],
    lines: Sequence[tuple[str, tuple[str, str, str | float]]],
) -> str:
    """A line for each method and row that has run on at least half of the tasks, and where it says something new."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, (method, row, by) in lines:
        cells = []
        for results, task in columns:
            found = {metric: results.values(metric, task, method, row, choose_by=by) for metric in METRICS}
            whole = " / ".join(cell(list(found[metric].values()), metric) for metric in METRICS)
            cells.append(whole if whole.strip("–/ ") else "–")
        if 2 * cells.count("–") <= len(cells):
            rows.setdefault((method, row, *cells), [name, *cells])
    return table(["accuracy (%) / ECE (%) / NLL", *heads], list(rows.values()))


def recommended(*suites: Results) -> str:
    """What the end of training recommends against AdamW + temperature scaling, its rate by validation, task by task.

    IVON-LoRA's is by the preset: without a rate, which is the usual one, and with one by validation. Paired by seed.
    It holds where NLL and accuracy are worse by one standard error at most, and wins where the NLL is better by two.
    Where validation chooses the usual rate, one line says it.
    """
    ours, ways = PRESET[0], {"none": PRESET[1], "by validation": "nll"}
    rows: list[list[str]] = []
    for results in suites:
        suite = results.suite
        for task, spec in suite["tasks"].items():
            epochs = suite["steps"] * suite["batch"] / spec["train"]
            model = suite.get("model", "MiniLM").partition("-Instruct")[0]
            adapter = f"r {suite['rank']} on {'all linear layers' if len(suite['targets']) > 2 else 'q and v'}"
            what = f"{model}, {adapter}, {task}, {suite['steps']} steps, {epochs:.0f} epochs"
            for rate, by in ways.items():
                if by not in suite["methods"][ours]["choose_by"]:
                    continue
                cells = _recommended_cells(results, task, ours, by)
                if cells and not (rows and rows[-1][0] == what and rows[-1][2:] == cells):
                    rows.append([what, rate, *cells])
    heads = ["AdamW + temperature scaling → what is recommended", "rate", "seeds", "NLL", "accuracy, %", "holds"]
    return table(heads, rows)


def _recommended_cells(results: Results, task: str, ours: str, by: str) -> list[str]:
    """Return the number of seeds, NLL, accuracy and whether they hold; nothing if there is no run."""
    cells, changes, seeds = [], {}, list[int]()
    for metric in ("nll", "accuracy"):
        before = results.values(metric, task, "adamw", "temperature-scaling")
        after = results.values(metric, task, ours, "calibrated", choose_by=by)
        seeds = sorted(before.keys() & after.keys())
        if not seeds:
            return []
        _, scale, digits = METRICS[metric]
        change, error = mean_and_error([scale * (after[seed] - before[seed]) for seed in seeds])
        changes[metric] = change, error
        first, second = (scale * statistics.fmean(values[seed] for seed in seeds) for values in (before, after))
        spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
        cells.append(f"{first:.{digits}f} → {second:.{digits}f} ({change:+.{digits}f}{spread})")
    (nll, nll_error), (accuracy, accuracy_error) = changes["nll"], changes["accuracy"]
    holds = "yes" if nll <= nll_error and accuracy >= -accuracy_error else "no"
    holds = "wins" if holds == "yes" and nll < 0 and nll <= -2 * nll_error else holds
    return [str(len(seeds)), *cells, holds if len(seeds) > 1 else "one seed"]


def shape(results: Results) -> str:
    """Does the shape of σ carry information? NLL of the draws and of pruned means, paired by seed."""
    pairs = (
        ("σ permuted within each tensor, against σ", "sigma=permuted", "sigma=as-is"),
        ("σ constant within each tensor, against σ", "sigma=constant", "sigma=as-is"),
        ("half of the weights pruned by SNR, against by magnitude", "mean-pruned=snr,0.5", "mean-pruned=magnitude,0.5"),
        ("80 % pruned by SNR, against by magnitude", "mean-pruned=snr,0.8", "mean-pruned=magnitude,0.8"),
    )
    rows = []
    for name, one, other in pairs:
        cells = []
        for task in results.tasks():
            first, second = (results.values("nll", task, PRESET[0], row, choose_by=PRESET[1]) for row in (one, other))
            differences = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
            average, error = mean_and_error(differences) if differences else (float("nan"), float("nan"))
            cells.append(f"{average:+.3f} ± {error:.3f}" if differences else "–")
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    return table(["difference in NLL", *results.tasks()], rows)


def beyond(results: Results) -> str:
    """Which answers are wrong, and what of other domains: ours against AdamW + temperature scaling, by seed."""
    columns = {"NLL": "nll", "ECE, %": "ece", "AUROC of errors, %": "auroc", "AURC, %": "aurc"}
    domains = results.suite["domains"] if MOVIE in results.suite["tasks"] else []
    ours = {"what is recommended": "calibrated", "draws": "posterior"}
    rows = []
    for data, (name, row) in itertools.product(("test", *domains), ours.items()):
        tasks = results.tasks() if data == "test" else [MOVIE]
        cells = []
        for title, metric in columns.items():
            scale, digits = (100, 1) if title.endswith("%") else (1, 3)
            before = _over_tasks(results, metric, tasks, "adamw", "temperature-scaling", data)
            after = _over_tasks(results, metric, tasks, PRESET[0], row, data, PRESET[1])
            seeds = sorted(before.keys() & after.keys())
            if not seeds:
                continue
            first, second = (scale * statistics.fmean(values[seed] for seed in seeds) for values in (before, after))
            change, error = mean_and_error([scale * (after[seed] - before[seed]) for seed in seeds])
            cells.append(f"{first:.{digits}f} → {second:.{digits}f} ({change:+.{digits}f} ± {error:.{digits}f})")
        if cells:
            rows.append([", ".join(tasks) if data == "test" else f"{MOVIE}, on {data}", name, *cells])
    return table(["AdamW + temperature scaling → ours", "", *columns], rows)


PARTS_OF_THE_PRESET = {
    "ivon-auto": "signs at draws",
    "flat": "… gradients at draws with one σ for each tensor",
    "silent": "… gradients at the mean: signed momentum",
    "reparameterized": "… ĥ as IVON has it",
    "noisy-adamw": "AdamW's step at the same draws: the preset",
    "lion": "Lion",
    "adamw": "AdamW",
}


def work(results: Results) -> str:
    """What does the work: signs with one part of them changed, averaged over the tasks."""
    columns = [("accuracy", "mean"), *(("nll", row) for row in ("mean", "temperature-scaling", "posterior"))]
    columns.append(("ece", "posterior"))
    rows = []
    for method, name in PARTS_OF_THE_PRESET.items():
        if method not in results.suite["methods"]:
            continue
        found = [averaged(results, metric, method, row) for metric, row in columns]
        if found[0]:
            seeds = str(len(found[0]))
            rows.append([name, seeds, *(cell(list(v.values()), m) for v, (m, _) in zip(found, columns, strict=True))])
    return table(["", "seeds", "accuracy of the mean, %", "its NLL", "+ T", "NLL of 8 draws", "their ECE, %"], rows)


PEERS = (
    ("adamw-stopped", "mean"),
    ("adamw-stopped", "temperature-scaling"),
    ("adamw", "ensemble"),
    ("adamw", "mc-dropout"),
    ("adamw", "laplace=diag"),
    ("adamw", "laplace=kron"),
    ("blob", "posterior"),
    ("ivon-opt", "posterior"),
    ("ivon-paper", "posterior"),
)


def peers(results: Results) -> str:
    """Early stopping, and other ways to a posterior, on the tasks that have run, beside the untuned mean there."""
    rows = []
    for method, row in PEERS:
        tasks = [
            task
            for task in results.suite["tasks"]
            if method in results.suite["methods"]
            and results.find(task, method, row)
            and results.find(task, PRESET[0], "mean", choose_by=PRESET[1])
        ]
        if not tasks:
            continue
        cells, better = [], []
        for metric in METRICS:
            theirs = _over_tasks(results, metric, tasks, method, row, "test")
            ours = _over_tasks(results, metric, tasks, PRESET[0], "mean", "test", PRESET[1])
            if row != "ensemble":  # which is one model of all seeds
                theirs, ours = ({seed: own[seed] for seed in theirs if seed in ours} for own in (theirs, ours))
            cells.append(f"{cell(list(theirs.values()), metric)} ({cell(list(ours.values()), metric)})")
            better.append((statistics.fmean(theirs.values()), statistics.fmean(ours.values())))
        (accuracy, our_accuracy), _, (nll, our_nll) = better
        both = "yes" if accuracy > our_accuracy and nll < our_nll else "no"
        rows.append([name_of(results, method, row, "nll"), ", ".join(tasks), *cells, both])
    heads = [
        "peer (the untuned mean of IVON-LoRA)",
        "tasks",
        "accuracy, %",
        "ECE, %",
        "NLL",
        "better in accuracy and NLL",
    ]
    return table(heads, rows)


def training(*suites: Results) -> str:
    """How the untuned mean stands to AdamW, its rate by validation, over the length of training and the size of data.

    A line a suite, over all of the tasks that both have run on, and one of the first where there are several.
    """
    rows = []
    for results in suites:
        suite = results.suite
        names = [task for task in suite["tasks"] if results.find(task, PRESET[0], "mean", choose_by=PRESET[1])]
        for some in [names, names[:1]] if len(names) > 1 else [names] if names else []:
            cells, seeds = [], set[int]()
            for row, metric in (("mean", "nll"), ("mean", "ece"), ("mean", "accuracy"), ("temperature-scaling", "nll")):
                _, scale, digits = METRICS[metric]
                theirs = _over_tasks(results, metric, some, "adamw", row, "test")
                ours = _over_tasks(results, metric, some, PRESET[0], row, "test", PRESET[1])
                if seeds := theirs.keys() & ours.keys():
                    first, second = (scale * statistics.fmean(own[seed] for seed in seeds) for own in (theirs, ours))
                    cells.append(f"{first:.{digits}f} → {second:.{digits}f}")
            if len(cells) < 4:
                continue
            [size] = {suite["tasks"][name]["train"] for name in some}
            steps = suite["steps"]
            what = some[0] if len(some) == 1 else f"{len(some)} tasks of {size}"
            rows.append([what, f"{steps} ({steps * suite['batch'] / size:.0f} epochs)", str(len(seeds)), *cells])
    return table(
        ["AdamW, rate by validation → the mean", "steps", "seeds", "NLL", "ECE, %", "accuracy, %", "NLL, both + T"],
        rows,
    )


# What the settings of the ablations are called.
VARIED = {
    "lr": "the most that a step moves a weight",
    "hessian": "ĥ",
    "few": "least N in a short run, and in a long one",
    "averaged": "mean of the iterates, of this last share",
    "accumulate": "micro-batches a step",
    "one_draw": "one draw for all of them",
    "blocks": "precision of rank × rank for each column of A and row of B",
    "antithetic": "mirrored in the second",
    "prior_strength": "prior strength κ",
    "memory": "memory of the precision, as a share of the run",
    "rank": "rank",
    "upper": "upper layers",
    "targets": "matrices",
}


def ablations(results: Results) -> str:
    """What one setting changes: a line for each variant of an ablation, paired by seed with the method as it is."""
    rows = []
    for name, spec in results.suite["ablations"].items():
        if not {"mean", "posterior"} <= set(spec["rows"]):
            continue
        for variant in spec["variants"]:
            alone = {**results.suite, "ablations": {name: {**spec, "variants": [variant]}}}
            jobs = {json.loads(job.settings)["seed"]: job for job in ablation_jobs(alone, name, results.records)}
            cells, seeds = [], set(jobs)
            by = results.suite["methods"][spec["method"]].get("choose_by", ["nll"])[0]
            for row, metric in (("mean", "accuracy"), ("mean", "nll"), ("posterior", "ece"), ("posterior", "nll")):
                before = results.values(metric, spec["task"], spec["method"], row, choose_by=by)
                after = {
                    seed: record["metrics"][metric]
                    for seed, job in jobs.items()
                    if (record := results.index.get((job.key, row, "test")))
                }
                seeds = seeds & before.keys() & after.keys()
                if seeds and variant:
                    _, scale, digits = METRICS[metric]
                    change, error = mean_and_error([scale * (after[seed] - before[seed]) for seed in sorted(seeds)])
                    of = statistics.fmean(scale * after[seed] for seed in seeds)
                    spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
                    cells.append(f"{of:.{digits}f} ({change:+.{digits}f}{spread})")
            if len(cells) == 4:  # every row has run
                what = _varied(variant, results, jobs[min(seeds)]) + ", by signs" * (spec["method"] == "ivon-auto")
                rows.append([what, spec["task"], str(len(seeds)), *cells])
    heads = ["changed (against the method as it is)", "task", "seeds"]
    return table(
        [*heads, "accuracy of the mean, %", "NLL of the mean", "ECE of the draws, %", "NLL of the draws"], rows
    )


def _varied(variant: Mapping[str, Any], results: Results, job: Job) -> str:
    """Return what a variant is called; λ is said as it came out."""
    ess = results.index[job.key, "mean", "test"]["facts"].get("ivon_ess", math.nan)
    return "; ".join(
        f"λ: {ess:,.0f}" if key == "per_weight" else f"{VARIED.get(key, key)}: {_shown(value)}"
        for key, value in variant.items()
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


PARTS: dict[str, Callable[..., str]] = {
    "headline": headline,
    "summary": summary,
    "promises": promises,
    "tasks": tasks,
    "stage": stage,
    "recommended": recommended,
    "work": work,
    "shape": shape,
    "beyond": beyond,
    "peers": peers,
    "training": training,
    "ablations": ablations,
}


def fill(page: str, suites: Mapping[str, Any], records: list[Record]) -> str:
    """Return a page with its tables made anew.

    Raises:
        KeyError: a place names no suite or no part.
    """

    def made(place: re.Match[str]) -> str:
        results = [Results(suites[name], records) for name in place[2].split(",")]
        return place[1] + PARTS[place[3]](*results) + "\n" + place[4]

    return PLACE.sub(made, page)


def learning_curves(results: Results, ours: str, rate: str) -> Figure:
    """Draw validation metrics over the steps of a run: AdamW at each of the paper's rates, our mean and its draws."""
    names = results.tasks()
    figure = Figure(figsize=(10, 2.6 * len(names)), layout="constrained")
    lines: list[tuple[str, str, str, str | float, str, bool]] = [
        ("AdamW 2e-4", "adamw", "mean", 2.0e-4, "#9a9a9a", False),
        ("AdamW 5e-4", "adamw", "mean", 5.0e-4, "#4d4d4d", False),
        *(
            (label_of(results, ours, row, rate).replace("*", ""), ours, row, rate, color, row == "posterior")
            for row, color in (("mean", "#56b4e9"), ("posterior", "#0072b2"))
        ),
    ]
    for task, panels in zip(names, figure.subplots(len(names), 3, squeeze=False), strict=True):
        for axis, (metric, (label, scale, _)) in zip(panels, METRICS.items(), strict=True):
            for name, method, row, by, color, draws in lines:
                curves = [
                    record["facts"].get("curve", [])
                    for record in results.find(task, method, row, choose_by=by).values()
                ]
                at: dict[int, list[float]] = {}
                for point in (point for curve in curves for point in curve):
                    values = point.get("draws") if draws else point
                    if values:
                        at.setdefault(point["step"], []).append(scale * values[metric])
                axis.plot(
                    list(at), [statistics.fmean(values) for values in at.values()], "o-", color=color, ms=3, label=name
                )
            axis.set_title(f"{task}: {label}{' (%)' if scale == 100 else ''}", fontsize=9)
            axis.grid(alpha=0.3)
        panels[0].set_xlabel("step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def knobs(results: Results) -> Figure:
    """Draw the NLL over λ, of the mean and of its draws, and over the share of weights pruned, by SNR and magnitude."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    at: dict[float, dict[str, list[float]]] = {}
    jobs, spec = ablation_jobs(results.suite, "per-weight", results.records), results.suite["ablations"]["per-weight"]
    for row in ("mean", "posterior"):
        own = results.find(MOVIE, spec["method"], row)
        records = [own.get(seed) for seed in spec["seeds"]]
        for record in [*records, *(results.index.get((job.key, row, "test")) for job in jobs)]:
            if record:
                point = at.setdefault(record["facts"]["ivon_ess"], {})
                point.setdefault(row, []).append(record["metrics"]["nll"])
    for row, name, color in (("mean", "the mean", "#56b4e9"), ("posterior", "8 draws", "#0072b2")):
        points = sorted((ess, statistics.fmean(values[row])) for ess, values in at.items() if row in values)
        left.plot(*zip(*points, strict=True), "o-", color=color, label=name)
    left.set_xscale("log")
    left.set_xlabel("λ, the effective sample size (by signs; 256 examples; the preset's is 256,000)", fontsize=8)
    for criterion, color in (("snr", "#0072b2"), ("magnitude", "#9a9a9a")):
        points = []
        for ratio in (0.0, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9):
            row = f"mean-pruned={criterion},{ratio:g}" if ratio else "mean"
            if found := results.values("nll", MOVIE, PRESET[0], row, choose_by=PRESET[1]):
                points.append((100 * ratio, statistics.fmean(found.values())))
        name = "by |m|/σ" if criterion == "snr" else "by |m|"
        right.plot(*zip(*points, strict=True), "o-", color=color, label=name)
    right.set_xlabel("weights pruned, %", fontsize=8)
    for axis in (left, right):
        axis.set_ylabel("NLL, movie-256", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure
