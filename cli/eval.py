"""`ivon-post eval`: accuracy, calibration and uncertainty of base model, mean and posterior on data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from ._options import Point, Terminal, evaluation_options, point_options, terminal_as_one
from ._progress import silence_libraries
from ._tables import decimal, emit, file_names, is_wide, percent, print_table

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


@click.command("eval")
@evaluation_options
@point_options(
    "Temperature of the posterior rows: σ/√τ; inf is the mean.  [default: 1]",
    "Share of weights that the pruned rows lack.  [default: 0.1]",
)
@click.option("--rows", default=_ROWS, show_default=True, help="Which rows, with commas between.")
@terminal_as_one
def command(
    adapter: str, data: Sequence[str], run: dict[str, Any], point: Point, rows: str, terminal: Terminal, **loading: Any
) -> None:
    """Evaluate ADAPTER on data: the base model, the mean, and the average over draws from the posterior.

    \b
    Prints, with bootstrap standard errors, for every file and row
      accuracy    of the answer; with --task generate, of the next token of the reference answer
      ECE         expected calibration error, 10 and 15 bins
      NLL         of what is right, in nats; with --task generate PPL, the perplexity, too
      Brier       score: Σ(p − y)² over the choices
      AUROC       of the confidence, for being right
      entropy     of the prediction = expected (noise in the data) + mutual (disagreement of the draws)

    \b
      ivon-post eval adapter/ --data held-out.jsonl --data shifted.jsonl
    """
    tau, prune_ratio = point.settings(default_ratio=0.1)
    with terminal.progress() as progress:
        progress.begin("loading the base model")
        silence_libraries()
        from axolotl_ivon.evaluation.evaluate import Evaluation, choose_rows, count_passes, summarize

        chosen = choose_rows(rows.split(","), tau, prune_ratio)
        evaluation = Evaluation(adapter, data, rows=chosen, **loading)
        chosen = evaluation.meaningful(chosen, progress.notify)
        scores = evaluation.run(
            chosen,
            **run,
            progress=progress.begin("evaluating", count_passes(chosen, run["samples"]) * len(evaluation.items)),
            notify=progress.notify,
        )
        progress.begin("bootstrap")
        found = summarize(evaluation, chosen, scores, run["samples"])
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
    }
    if terminal.as_json:
        emit({"rows": found, **facts})
    else:
        _print(found, facts)


def _print(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print a table with a row for every file and model; with standard errors and all columns where there is room."""
    wide = is_wide(140)
    heads = [head for head in (_COLUMNS if wide else _NARROW) if facts["task"] == "generate" or head != "PPL"]
    names = file_names([row["data"] for row in rows])
    lines: list[list[str]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before["data"] != row["data"]:
            lines.append([f"{names[row['data']]} ({row['examples']})", *([""] * len(heads))])
        lines.append([f" {row['name']}"])
        for metric, write, error in (_COLUMNS[head] for head in heads):
            lines[-1].append(write(row[metric], row["se"][metric] if wide and error else None))
    choices = f" between {', '.join(facts['choices'])}" if facts["choices"] else ""
    draws = f"{facts['samples']} draws at τ {facts['tau']}, pruning ratio {facts['prune_ratio']:g}"
    print_table(["", *heads], lines, f"{facts['task']}{choices}; {draws}")
