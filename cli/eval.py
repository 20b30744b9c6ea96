"""`ivon-post eval`: accuracy, calibration and uncertainty of base model, mean and posterior on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from axolotl_ivon.evaluation import ADDED_VARIANTS, PAPER_VARIANTS
from axolotl_ivon.metrics.verdict import METRICS
from axolotl_ivon.storage.format import file_names

from . import _options as options
from ._stdout import results
from ._tables import decimal, emit, heads, is_wide, percent, print_table

if TYPE_CHECKING:
    from axolotl_ivon.records.evaluation import EvaluationRecord, OodResult, VariantResult

_ENTROPIES = ("entropy", "expected_entropy", "mutual_information")  # without standard errors
_QUALITY = ("accuracy", "ece", "ece15", "nll", "perplexity", "brier", "auroc", *_ENTROPIES)
_WIDE = ("ece15", "entropy", "expected_entropy")  # do not fit 80 columns; --json has everything at any width
_SELECTIVE = ("aurc", "augrc", "cov_at_5risk", "risk_at_80cov", "aece")  # of answering the most confident only
_DIFFERENCES = ("accuracy", "ece", "nll")


@click.command("eval", cls=options.Sectioned)
@options.adapter_argument
@options.data_options
@options.chat_template_option
@click.option(
    "--ood",
    multiple=True,
    metavar="FILE",
    help="Data unlike the training data, to measure how well uncertainty tells them apart. Chats, or "
    '{"text": …} if labels are predicted. Repeatable.',
)
@click.option(
    "--calibrate",
    metavar="FILE",
    help="Validation data on which a softmax temperature is fitted: adds mean+temperature and posterior+temperature.",
)
@options.server_options
@options.point_options(
    "Temperature of the posterior; relative to the adapter's own τ, inf is the mean.  [default: 1]",
    "Share of weights to prune in the pruned variants, which are then evaluated too.",
)
@click.option(
    "--rows",
    help=f"Variants to evaluate, with commas between: {', '.join(PAPER_VARIANTS)}; with a recommendation also "
    f"{', '.join(ADDED_VARIANTS)}.  [default: base,mean,posterior; with a ratio all five]",
)
@options.output_options(None, "JSONL for the prediction of every variant on every example.", metavar="FILE")
@options.as_one("files", options.evaluation_data, "data", "ood", "calibrate", "task", "choices", "by_length", "limit")
def command(
    adapter: str,
    files: options.EvaluationData,
    sampling: options.Sampling,
    posterior_options: options.PosteriorOptions,
    rows: str | None,
    output: options.OutputOptions,
    loading: options.Loading,
    servers: options.Servers,
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
    Paired differences to the mean and the base model follow, with a verdict. A recommendation adds mean and draws at
    their own softmax temperatures, and a variant that abstains below its threshold.

    \b
      ivon-post eval adapter/ --data held-out.jsonl --data shifted.jsonl
      ivon-post eval adapter/ --data test.jsonl --calibrate validation.jsonl --ood other.jsonl -o examples.jsonl
      ivon-post eval ensemble/ --data test.jsonl --endpoint http://localhost:8000
    """
    from axolotl_ivon.evaluation.run import run as evaluate
    from axolotl_ivon.evaluation.variants import VariantChoice, paper_variants
    from axolotl_ivon.storage.atomic import check_file

    names = [name.strip() for name in rows.split(",")] if rows is not None else []
    if served := servers.model(adapter, loading):
        sampling = served.sampling
    pruned = any("pruned" in name for name in names)
    plain = (
        names and {*names} <= {"base", "mean"} and not posterior_options.file
    )  # of these a recommendation changes nothing
    taken = None if plain else posterior_options.taken(adapter, output, served=bool(served))
    choice = taken.choice() if taken else VariantChoice()
    files = replace(files, by_length=files.by_length or bool(taken and taken.rule.by_length))
    tau = choice.tau if posterior_options.tau is None else posterior_options.tau
    ratio = posterior_options.ratio if posterior_options.ratio is not None else choice.ratio or 0.1 * pruned
    # The T of draws is that of one τ.
    there = [row for row in choice.added if row.name == "recommended" or row.tau in (tau, math.inf)]
    # Who names rows gets these alone, and from a file that is named what it says of them.
    more = (*names, "recommended") if posterior_options.file else ()
    added = [row for row in there if not names or row.name in names or row.name.partition("+")[0] in more]
    if not {*names} <= {*paper_variants(), *(row.name for row in there)}:
        added = there  # which the refusal names
    choice = replace(choice, names=names, tau=tau, ratio=ratio, added=added)
    calibrate = None if files.calibrate is None else str(files.calibrate)
    data, ood = ([*map(str, paths)] for paths in (files.files, files.ood))
    written = output.given_path(adapter, data=data, ood=ood, calibrate=calibrate)
    if written:
        check_file(written, output.overwrite)
    with output.progress() as progress:
        evaluated = evaluate(adapter, files, choice, sampling, loading, progress, output.output, served)
    record = evaluated.record
    if output.as_json:
        emit(record.dump())
        return
    _print(record)
    if written:
        click.echo(written, file=results())
    if served:
        sweep = ["ivon-post", "sweep", adapter, "--data", "VALIDATION.jsonl", *servers.words]
        output.suggest(*([] if taken else sweep))
    elif taken or not evaluated.evaluation.posterior.metadata:
        given = ["--recommended", posterior_options.file] if posterior_options.file else []
        output.suggest("ivon-post", "sample" if taken and not taken.is_mean else "merge", adapter, *given)
    else:
        output.suggest("ivon-post", "sweep", adapter, "--data", "VALIDATION.jsonl")


def _print(record: EvaluationRecord) -> None:
    """Print tables and what they mean; standard errors and all columns where there is room."""
    wide = is_wide(140)
    hidden = (*([] if wide else _WIDE), *([] if record.task == "generate" else ["perplexity"]))
    quality = [metric for metric in _QUALITY if metric not in hidden]
    choices = f" between {', '.join(record.choices)}" if record.choices else ""
    _print_metrics(record.rows, quality, f"{record.task}{choices}; {record.draws}", wide)
    if scaled := {row.name: f"{row.name} {row.temperature:.3g}" for row in record.rows if row.temperature != 1}:
        where = f" fitted on {record.calibration.data}" if record.calibration else ""
        click.echo(f"softmax temperatures{where}: {', '.join(scaled.values())}\n")
    _print_metrics(record.rows, _SELECTIVE, "if only the most confident are answered", wide)
    _print_differences(record.rows, wide)
    if record.ood:
        _print_ood(record.ood, wide)
    names = file_names([verdict.data for verdict in record.verdicts])
    for verdict in record.verdicts:
        click.echo(f"{names[verdict.data]}: {verdict.text}" if len(names) > 1 else verdict.text)
    names = file_names([row.data for row in record.rows])
    for row in record.rows:
        if row.coverage is not None:
            text = f"{names[row.data]}: {percent(row.coverage)} % answered, from confidence {row.threshold:.4g} on"
            if row.accuracy is not None:
                text += f", {percent(row.accuracy, row.se.accuracy)} % of them right"
            click.echo(text)


def _print_metrics(rows: list[VariantResult], metrics: Sequence[str], title: str, wide: bool) -> None:
    def cells(row: VariantResult) -> list[str]:
        errors = {metric: row.se.value(metric) for metric in metrics if wide and metric not in _ENTROPIES}
        return [METRICS[metric].write(row.value(metric), errors.get(metric)) for metric in metrics]

    print_table(["", *heads(metrics)], _by_file(rows, cells, len(metrics)), title)


def _print_differences(rows: list[VariantResult], wide: bool) -> None:
    """Print every variant's differences to the mean, and where there is room to the base model."""
    shown = [than for than in ("mean", "base") if any(row.versus(than) for row in rows)][: 2 if wide else 1]
    if not shown:
        return

    def cells(row: VariantResult) -> list[str]:
        texts = []
        for than in shown:
            for metric in _DIFFERENCES:
                paired, write = row.versus(than).get(metric), METRICS[metric].write
                texts.append(write(paired.difference, paired.standard_error, "+") if paired else "")
        return texts

    some = [row for row in rows if any(row.versus(than) for than in shown)]
    columns = [f"{'Δ' if than == shown[0] else 'Δ base'} {head}" for than in shown for head in heads(_DIFFERENCES)]
    title = f"differences to the {' and the '.join(shown)}, paired"
    print_table(["", *columns], _by_file(some, cells, len(columns)), title)


def _by_file(rows: list[VariantResult], cells: Callable[[VariantResult], list[str]], width: int) -> list[list[str]]:
    """Return the lines of a table: a heading for every file, then its rows."""
    names = file_names([row.data for row in rows])
    lines: list[list[str]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before.data != row.data:
            lines.append([f"{names[row.data]} ({row.examples})", *([""] * width)])
        lines.append([f" {row.name}", *cells(row)])
    return lines


def _print_ood(ood: list[OodResult], wide: bool) -> None:
    """Print how well each score of each variant tells each file from the data."""
    names = file_names([result.data for result in ood])
    kinds = list(dict.fromkeys(result.score for result in ood))
    lines: list[list[str]] = []
    for path in names:
        lines.append([names[path], *([""] * len(kinds) * (1 + wide))])
        for variant in dict.fromkeys(result.name for result in ood):
            by_score = {result.score: result for result in ood if (result.data, result.name) == (path, variant)}
            own = [by_score.get(kind) for kind in kinds]
            cells = [decimal(each.auroc, each.se.auroc if wide else None) if each else "–" for each in own]
            if wide:
                cells += [percent(each.fpr95) if each else "–" for each in own]
            lines.append([f" {variant}", *cells])
    short = {"max_probability": "max p", "mutual_information": "mutual"}
    columns = [short.get(kind, kind) for kind in kinds]
    title = "AUROC of the uncertainty for telling foreign examples" + ("; last columns: FPR95 %" if wide else "")
    print_table(["", *columns, *(columns if wide else [])], lines, title)
