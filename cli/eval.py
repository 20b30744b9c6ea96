"""`ivon-post eval`: accuracy, calibration and uncertainty of base model, mean and posterior on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    OutputOptions,
    PosteriorOptions,
    Sectioned,
    decision,
    evaluation_options,
    output_as_one,
    point_options,
)
from ._progress import Progress
from ._stdout import results
from ._tables import decimal, emit, file_names, is_wide, percent, print_table

if TYPE_CHECKING:
    from axolotl_ivon.decisions.sweep import Decision
    from axolotl_ivon.evaluation.evaluate import Evaluation
    from axolotl_ivon.metrics.scores import Scores
    from axolotl_ivon.models.session import Loading

_ROWS = "base,mean,mean-pruned,posterior,posterior-pruned"
# Heading -> (metric, how it is written, whether its standard error is shown).
_COLUMNS = {
    "acc %": ("accuracy", percent, True),
    "ECE %": ("ece", percent, True),
    "ECE-15 %": ("ece15", percent, True),
    "NLL": ("nll", decimal, True),
    "PPL": ("perplexity", decimal, True),
    "Brier": ("brier", decimal, True),
    "AUROC": ("auroc", decimal, True),
    "entropy": ("entropy", decimal, False),
    "expected": ("expected_entropy", decimal, False),
    "mutual": ("mutual_information", decimal, False),
}
# What fits 80 columns; --json has everything at any width.
_NARROW = ("acc %", "ECE %", "NLL", "PPL", "Brier", "AUROC", "mutual")
# The table of what comes of answering the most confident only.
_SELECTIVE = {
    "AURC %": ("aurc", percent, True),
    "AUGRC %": ("augrc", percent, True),
    "cov@5 %": ("cov_at_5risk", percent, True),
    "risk@80 %": ("risk_at_80cov", percent, True),
    "aECE %": ("aece", percent, True),
}
_DIFFERENCES = {"acc %": ("accuracy", percent), "ECE %": ("ece", percent), "NLL": ("nll", decimal)}


@click.command("eval", cls=Sectioned)
@evaluation_options
@click.option(
    "--ood",
    multiple=True,
    metavar="FILE",
    help="Out-of-distribution data, detected by the uncertainty of predictions. Repeatable.",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    help="Validation data on which a softmax temperature is fitted: adds mean+temperature and posterior+temperature.",
)
@point_options(
    "Temperature of the posterior; inf is the mean.  [default: 1]",
    "Share of weights that the pruned variants lack.  [default: 0.1]",
)
@click.option("--rows", default=_ROWS, show_default=True, help="Variants to evaluate, with commas between.")
@click.option("--output", "-o", metavar="FILE", help="JSONL for the prediction of every variant on every example.")
@click.option("--overwrite", is_flag=True, help="Replace the target if it exists.")
@output_as_one
def command(
    adapter: str,
    data: Sequence[str],
    ood: Sequence[str],
    calibrate: str | None,
    run: dict[str, Any],
    point: PosteriorOptions,
    rows: str,
    output: OutputOptions,
    loading: Loading,
    **examples: Any,
) -> None:
    """Measure accuracy, calibration and uncertainty.

    Evaluates the base model, the mean of ADAPTER, and the average over draws from its posterior.

    \b
    Metrics of every file and variant, with bootstrap standard errors
      accuracy    of the answer; with --task generate, of the next token of the reference answer
      ECE         expected calibration error, with 10 and 15 bins; aECE: 10 bins of equal size
      NLL         of the correct answer, in nats; with --task generate also PPL, the perplexity
      Brier       score: Σ(p − y)² over the choices
      AUROC       of the confidence, for correct answers
      entropy     of the prediction = expected (noise in the data) + mutual (disagreement of the draws)
    \b
    Metrics when only the most confident answers are kept
      AURC, AUGRC areas under the risk-coverage curve and its generalized form; risk is the share of errors
      cov@5       largest coverage with at most 5 % errors
      risk@80     share of errors among the 80 % most confident
    \b
    Paired differences to the mean and the base model follow, with a verdict. A threshold in --recommended adds a
    variant that abstains below it.

    \b
      ivon-post eval adapter/ --data held-out.jsonl --data shifted.jsonl
      ivon-post eval adapter/ --data test.jsonl --calibrate validation.jsonl --ood other.jsonl -o examples.jsonl
    """
    from axolotl_ivon.decisions.sweep import Decision
    from axolotl_ivon.evaluation.evaluate import (
        Evaluation,
        Variant,
        calibrated_rows,
        choose_rows,
        count_passes,
        summarize,
    )
    from axolotl_ivon.evaluation.examples import check_output

    tau, prune_ratio = point.settings(adapter, default_ratio=0.1)
    chosen = choose_rows([name.strip() for name in rows.split(",")], tau, prune_ratio)
    decided = decision(point.recommended)
    if decided != Decision(mean_sha256=decided.mean_sha256):
        chosen.append(Variant("recommended", tau, prune_ratio, temperature=decided.temperature))
    scaled = calibrated_rows(chosen) if calibrate else []
    written = output.path(adapter, "") if output.output is not None else None
    if written:
        check_output(written, output.overwrite)
    with output.progress() as progress:
        evaluation = Evaluation(
            adapter,
            data,
            rows=chosen,
            ood=ood,
            calibrate=calibrate,
            begin=progress.begin,
            **examples,
            **asdict(loading),
        )
        from axolotl_ivon.evaluation.examples import save
        from axolotl_ivon.evaluation.ood import detect
        from axolotl_ivon.metrics.verdict import verdicts

        chosen = evaluation.meaningful(chosen, progress.notify)
        calibration = None
        if calibrate:
            total = count_passes(scaled, run["samples"]) * len(evaluation.held_out)
            fitted = evaluation.temperatures(
                scaled, **run, progress=progress.begin("fitting temperatures", total), notify=progress.notify
            )
            chosen += fitted
            temperatures = {row.name: row.temperature for row in fitted}
            calibration = {"data": calibrate, "examples": len(evaluation.held_out), "temperatures": temperatures}
        scores = evaluation.run(
            chosen,
            **run,
            progress=progress.begin("evaluating", count_passes(chosen, run["samples"]) * len(evaluation.items)),
            notify=progress.notify,
        )
        if written:
            save(written, evaluation, chosen, scores)
        progress.begin("bootstrap")
        found = summarize(evaluation, chosen, scores, run["samples"])
        if decided.threshold is not None:
            names = [row.name for row in chosen]
            found = _with_answered(found, evaluation, scores[names.index("recommended")], decided, progress)
        told = detect(evaluation, chosen, scores, run["samples"])
    facts = {
        "task": evaluation.task,
        "choices": list(evaluation.choices),
        "adapter": adapter,
        "mean_sha256": evaluation.posterior.metadata.get("mean_sha256"),
        "base_model": evaluation.base_model,
        "samples": run["samples"],
        "tau": "inf" if math.isinf(tau) else tau,
        "prune_ratio": prune_ratio,
        "seed": run["seed"],
        "calibration": calibration,
        "output": output.output,
    }
    said = verdicts(found)
    if output.as_json:
        emit({"rows": found, "ood": told, "verdicts": said, **facts})
        return
    _print(found, facts)
    if told:
        _print_ood(told)
    _print_verdicts(said)
    _print_answered(found)
    if written:
        click.echo(written, file=results())
    given = ["--recommended", point.recommended] if point.recommended else []
    if given or not evaluation.posterior.metadata:
        output.suggest("ivon-post", "sample" if given else "merge", adapter, *given)
    else:
        output.suggest("ivon-post", "sweep", adapter, "--data", "VALIDATION.jsonl")


def _with_answered(
    rows: list[dict[str, Any]], evaluation: Evaluation, scores: Scores, decided: Decision, progress: Progress
) -> list[dict[str, Any]]:
    """Add a row for what is answered of "recommended", to each file's rows."""
    from axolotl_ivon.decisions.abstention import with_answered

    assert decided.threshold is not None
    if evaluation.task == "generate" or decided.score != "probability":
        what = (
            "single answers, and generate scores tokens" if decided.score == "probability" else "the outputs' agreement"
        )
        progress.notify(f"the threshold of the recommendation is of {what}: use it with `ivon-post mbr`")
        return rows
    return with_answered(rows, "recommended", evaluation.files, scores, decided.threshold)


def _print_answered(rows: list[dict[str, Any]]) -> None:
    """Print what share is answered, and what that is worth."""
    names = file_names([row["data"] for row in rows])
    for row in rows:
        if "coverage" in row:
            told = f"{names[row['data']]}: {percent(row['coverage'])} % answered, from confidence "
            told += f"{row['threshold']:.4g} on"
            if row["accuracy"] is not None:
                told += f", {percent(row['accuracy'], row['se']['accuracy'])} % of them right"
            click.echo(told)


def _print(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print tables with a row for every file and model; with standard errors and all columns where there is room."""
    wide = is_wide(140)
    heads = [head for head in (_COLUMNS if wide else _NARROW) if facts["task"] == "generate" or head != "PPL"]
    choices = f" between {', '.join(facts['choices'])}" if facts["choices"] else ""
    draws = f"{facts['samples']} draws at τ {facts['tau']}, pruning ratio {facts['prune_ratio']:g}"
    quality = {head: _COLUMNS[head] for head in heads}
    _print_metrics(rows, quality, f"{facts['task']}{choices}; {draws}", wide)
    if facts["calibration"]:
        fitted = ", ".join(f"{name} {value:.3g}" for name, value in facts["calibration"]["temperatures"].items())
        click.echo(f"fitted on {facts['calibration']['data']}: {fitted}\n")
    _print_metrics(rows, _SELECTIVE, "if only the most confident are answered", wide)
    _print_differences(rows, wide)


def _print_metrics(rows: list[dict[str, Any]], columns: dict[str, Any], title: str, wide: bool) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        errors = row["se"] if wide else {}
        return [write(row[metric], errors.get(metric) if error else None) for metric, write, error in columns.values()]

    print_table(["", *columns], _by_file(rows, cells, len(columns)), title)


def _print_differences(rows: list[dict[str, Any]], wide: bool) -> None:
    """Print every row's differences to the mean, and where there is room to the base model."""
    shown = [than for than in ("mean", "base") if any(f"versus_{than}" in row for row in rows)]
    shown = shown if wide else shown[:1]
    if not shown:
        return

    def cells(row: dict[str, Any]) -> list[str]:
        found = []
        for than in shown:
            for metric, write in _DIFFERENCES.values():
                versus = row.get(f"versus_{than}", {}).get(metric)
                found.append(write(versus["difference"], versus["standard_error"], signed=True) if versus else "")
        return found

    some = [row for row in rows if any(f"versus_{than}" in row for than in shown)]
    heads = [f"{'Δ' if than == shown[0] else 'Δ base'} {head}" for than in shown for head in _DIFFERENCES]
    print_table(
        ["", *heads], _by_file(some, cells, len(heads)), f"differences to the {' and the '.join(shown)}, paired"
    )


def _by_file(rows: list[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]], width: int) -> list[list[str]]:
    """Return the lines of a table: a heading for every file, then its rows."""
    names = file_names([row["data"] for row in rows])
    lines: list[list[str]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before["data"] != row["data"]:
            lines.append([f"{names[row['data']]} ({row['examples']})", *([""] * width)])
        lines.append([f" {row['name']}", *cells(row)])
    return lines


def _print_ood(found: list[dict[str, Any]]) -> None:
    """Print how well each score of each row tells each file from the data."""
    wide = is_wide(140)
    names = file_names([one["data"] for one in found])
    kinds = list(dict.fromkeys(one["score"] for one in found))
    lines: list[list[str]] = []
    for path in names:
        lines.append([names[path], *([""] * len(kinds) * (1 + wide))])
        for row in dict.fromkeys(one["name"] for one in found):
            told = {one["score"]: one for one in found if (one["data"], one["name"]) == (path, row)}
            cells = [
                decimal(told[kind]["auroc"], told[kind]["se"]["auroc"] if wide else None) if kind in told else "–"
                for kind in kinds
            ]
            if wide:
                cells += [percent(told[kind]["fpr95"]) if kind in told else "–" for kind in kinds]
            lines.append([f" {row}", *cells])
    short = {"max_probability": "max p", "mutual_information": "mutual"}
    heads = [short.get(kind, kind) for kind in kinds]
    title = "AUROC of the uncertainty, for not being of the data" + ("; right: FPR95 %" if wide else "")
    print_table(["", *heads, *(heads if wide else [])], lines, title)


def _print_verdicts(found: list[dict[str, Any]]) -> None:
    """Print what the differences mean, each line with its file where there are several."""
    names = file_names([one["data"] for one in found])
    for one in found:
        click.echo(f"{names[one['data']]}: {one['text']}" if len(names) > 1 else one["text"])
