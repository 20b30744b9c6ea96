"""`ivon-post sweep`: temperature and pruning ratio chosen from data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_ivon.metrics.verdict import METRICS, SIGNS
from axolotl_ivon.storage.format import RECOMMENDED_FILE, file_names

from . import _options as options
from ._tables import heads, is_wide, marks, print_table

if TYPE_CHECKING:
    from axolotl_ivon.decisions.weights import WeightsSweep
    from axolotl_ivon.records.recommendation import GridPoint, Recommendation


_grid: dict[str, Any] = {"type": options.numbers, "multiple": True}


@click.command("sweep", cls=options.Sectioned)
@click.argument("adapters", metavar="ADAPTER…", nargs=-1, required=True)
@click.option(
    "--combine", is_flag=True, help="Sweep the weights of several ADAPTERs in their product (`combine --weights`)."
)
@options.data_options
@options.chat_template_option
@options.option(
    "--tau", "taus", **_grid, default=["0.25,0.5,1,2,4,inf"],
    help="Temperatures to try, with commas between; inf is the mean.",
)  # fmt: skip
@options.option("--ratio", "ratios", **_grid, default=["0,0.1,0.3"], help="Pruning ratios to try, with commas between.")
@options.choice_option("--objective", list(SIGNS), "Metric by which a point is chosen.")
@options.server_options
@options.risk_options("Half of the data is used for this test alone.")
@click.option(
    "--coverage",
    type=float,
    help="Find the probability threshold for label sets that hold the right label this often, e.g. 0.9; see "
    "`predict --set`.",
)
@options.output_options("ADAPTER-sweep, or ADAPTER-weights", overwrite="Replace an earlier sweep in the target.")
@options.as_one("files", options.evaluation_data, "data", "task", "choices", "by_length", "limit")
@options.as_one("grid", dict, "taus", "ratios")
@options.as_one("aim", dict, "objective", "risk", "confidence", "coverage")
def command(
    adapters: tuple[str, ...],
    combine: bool,
    files: options.EvaluationData,
    grid: dict[str, tuple[tuple[float, ...], ...]],
    aim: dict[str, Any],
    sampling: options.Sampling,
    output: options.OutputOptions,
    loading: options.Loading,
    servers: options.Servers,
) -> None:
    """Choose temperature and pruning ratio on data.

    One half of the data chooses a point of the grid, and the other half reports on it. The point is recommended if it
    is better there than the mean, beyond noise. Otherwise the mean is recommended, at a softmax temperature if
    cross-validation says that one helps. Writes recommended.json, which other commands take as --recommended, and two
    pictures (PNG and SVG): accuracy against calibration error with the Pareto front, and reliability diagrams. With -o
    ADAPTER, recommended.json replaces that of training in the adapter's own folder, where other commands find it.

    With --combine, the posteriors of several ADAPTERs are multiplied at a grid of weights. Each product is evaluated on
    every FILE, at the mean unless --samples is given. Writes the product that is best on average as an adapter, with
    weights.json and a picture of the Pareto front over two files. Equal weights are kept unless others are better
    beyond noise.

    With --risk, recommended.json also has a threshold on the confidence (the largest averaged probability), below which
    `eval`, `predict`, `serve`, `generate` and `mbr` abstain. With --coverage it has sets of labels for `predict --set`.

    With --endpoint, ADAPTER is an ensemble: the mean is compared with its draws, each at its own softmax temperature.

    \b
      ivon-post sweep adapter/ --data validation.jsonl --tau 0.5,1,2,inf --ratio 0,0.1,0.2
      ivon-post sweep adapter/ --data validation.jsonl --risk 0.05 --confidence 0.9
      ivon-post sweep --combine a/ b/ --data a.jsonl --data b.jsonl
      ivon-post sweep ensemble/ --data validation.jsonl --endpoint http://localhost:8000
    """
    from axolotl_ivon.evaluation.evaluate import Evaluation

    if combine:
        _sweep_weights(adapters, files, aim["objective"], sampling, output, loading)
        return
    if len(adapters) > 1:
        raise click.UsageError(f"{len(adapters)} ADAPTERs: give one, or sweep the weights of several with --combine")
    [adapter] = adapters
    if served := servers.model(adapter, loading):
        sampling = replace(sampling, samples=served.sampling.samples)
        grid = {"taus": ((1.0, math.inf),), "ratios": ((0.0,),)}
    from axolotl_ivon.decisions.abstention import check_risk
    from axolotl_ivon.decisions.conformal import check_coverage, describe
    from axolotl_ivon.decisions.sweep import check_grid, sweep
    from axolotl_ivon.storage.atomic import check_folder

    # Its own folder is where all commands look for it.
    target = Path(output.output or "").resolve()
    own = output.output and not served and Path(adapter).is_dir() and target == Path(adapter).resolve()
    folder = Path(adapter) if own else output.path(adapter, "sweep")
    variants = check_grid(*([value for group in grid[name] for value in group] for name in ("taus", "ratios")))
    check_folder(folder, output.overwrite, RECOMMENDED_FILE)
    if aim["risk"] is not None:
        check_risk(aim["risk"], aim["confidence"])
    if aim["coverage"] is not None:
        check_coverage(aim["coverage"])
    with output.progress() as progress:
        evaluation = Evaluation(
            adapter, replace(files, risk=aim["risk"], coverage=aim["coverage"]), variants, loading, progress, served
        )
        result = sweep(evaluation, variants, sampling=sampling, **aim, reporter=progress)
        progress.begin("drawing")
        from axolotl_ivon.plots.sweep import save_sweep
        from axolotl_ivon.posterior.recommended import provenance

        facts = {
            "adapter": adapter,
            **provenance(result.recommendation, evaluation.posterior.metadata),
            "base_model": evaluation.base_model,
            "data": [str(path) for path in files.files],
            "task": evaluation.task,
            "choices": list(evaluation.choices),
            "by_length": files.by_length,
            "samples": sampling.samples,
            "seed": sampling.seed,
        }
        recommendation = result.recommendation.model_copy(update=facts)
        written = save_sweep(recommendation, result.reliability, folder, progress)
    if not output.as_json:
        _print(recommendation, result.recommended)
    values = recommendation.dump()
    recommended = {name: values[name] for name in ("tau", "ratio", "temperature", "objective")}
    document = {"recommended": recommended, "files": [str(path) for path in written], **values}
    promise = [result.abstention.describe(share=0.5)] if result.abstention else []
    promise += [describe(recommendation.prediction_set, parts=2)] if recommendation.prediction_set else []
    then: list[object] = ["ivon-post", "eval", adapter, "--data", "TEST.jsonl", *servers.words]
    then += [] if own else ["--recommended", written[0]]
    output.finish(
        document, values["verdict"]["text"], f"recommended: {recommendation.describe()}", *promise, *written, then=then
    )


def _sweep_weights(
    adapters: tuple[str, ...],
    files: options.EvaluationData,
    objective: str,
    sampling: options.Sampling,
    output: options.OutputOptions,
    loading: options.Loading,
) -> None:
    from axolotl_ivon.decisions.weights import check_files, save, sweep_weights
    from axolotl_ivon.evaluation.evaluate import Evaluation
    from axolotl_ivon.posterior.posterior import Posterior

    for option in options.given_options("taus", "ratios", "risk", "coverage", "endpoints"):
        raise click.UsageError(f"{option} has no effect with --combine; sweep the adapter that it writes")
    sampling = replace(sampling, samples=sampling.samples if options.given_options("samples") else 0)
    check_files(adapters, files.files)
    folder = output.target(adapters, "weights")
    with output.progress() as progress:
        posteriors = [Posterior.from_pretrained(adapter, progress) for adapter in adapters]
        Posterior.combine(posteriors)  # what does not go together is told before a model is loaded
        evaluation = Evaluation(adapters[0], files, (), loading, progress)
        result = sweep_weights(evaluation, posteriors, objective, sampling, progress)
        progress.begin("writing")
        facts = {
            "adapters": list(adapters),
            "data": list(evaluation.files),
            "task": evaluation.task,
            "samples": sampling.samples,
        }
        written = [save(result, posteriors, folder, facts, output.overwrite)]
        if len(evaluation.files) == 2:
            from axolotl_ivon.plots.style import save_figures
            from axolotl_ivon.plots.sweep import weights_front

            front = weights_front(result.points, result.chosen, result.objective)
            written += save_figures({"front": front}, folder)
    if not output.as_json:
        _print_weights(result)
    document = {"output": str(folder), "files": [str(path) for path in written]}
    document |= json.loads(written[0].read_text(encoding="utf-8"))
    weights = f"weights: {result.chosen.describe()}"
    then = ["ivon-post", "eval", folder, "--data", "TEST.jsonl"]
    output.finish(document, result.text, weights, folder, *written, then=then)


def _print_weights(result: WeightsSweep) -> None:
    """Print the objective and the accuracy of every product on every file."""
    names = file_names(list(result.chosen.chosen_on))
    metrics = list(dict.fromkeys(["nll", "accuracy", result.objective]))
    columns = [f"{name}: {head}" for name in names.values() for head in heads(metrics)]
    lines = []
    for point in result.points:
        cells = [METRICS[metric].write(point.chosen_on[path][metric]) for path in names for metric in metrics]
        kinds = marks(front=point.front, best=point is result.best, chosen=point is result.chosen)
        lines.append([point.describe(), *cells, kinds])
    title = f"on the half of each file that chooses (by {result.objective}; Pareto front)"
    print_table(["weights", *columns, ""], lines, title)


def _print(result: Recommendation, recommended: GridPoint) -> None:
    """Print the grid with the metrics on both halves, side by side."""
    metrics = ["accuracy", "ece", "nll", *(["brier"] if is_wide(100) else [])]
    settings = ["τ", "ratio", *(["T"] if result.scaled else [])]
    lines: list[list[str]] = []
    points = result.grid + result.scaled
    for before, point in zip([None, *points], points, strict=False):
        ends_block = before in result.grid and (point in result.scaled or before.ratio != point.ratio)
        if before and ends_block:
            lines.append([""] * (2 * len(metrics) + len(settings) + 1))
        lines.append([f"{point.tau:g}", f"{point.ratio:g}", f"{point.temperature:.3g}"][: len(settings)])
        for values in (point.chosen_on, point.reported_on):
            lines[-1] += [METRICS[metric].write(values.value(metric)) for metric in metrics]
        lines[-1].append(marks(front=point.front, best=point is result.best, recommended=point is recommended))
    assert result.examples
    title = (
        f"first columns: {result.examples.chosen_on} examples that choose (best {result.objective}; Pareto front); "
        f"last columns: {result.examples.reported_on} others"
    )
    print_table([*settings, *heads(metrics), *heads(metrics), ""], lines, title)
