"""`ivon-post report`: one page about an adapter, to show to others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ._options import OutputOptions, PosteriorOptions, Renamed, adapter_argument, output_options


@click.command("report", short_help="Write one HTML page on ADAPTER and its results.")
@adapter_argument
@click.option(
    "--eval", cls=Renamed, formerly=["--results"], metavar="FILE", help="What `ivon-post eval --json` printed."
)
@click.option("--examples", metavar="FILE", help="What the same `eval` wrote with -o.  [default: what --eval names]")
@click.option(
    "--sweep",
    cls=Renamed,
    formerly=["--recommended"],
    metavar="FILE",
    help="The recommended.json of `ivon-post sweep`.",
)
@click.option("--influence", metavar="FILE", help="What `ivon-post influence` wrote with -o.")
@click.option("--data", "-d", multiple=True, metavar="FILE", help="Without --eval: evaluate on this; several times.")
@click.option("--ood", multiple=True, metavar="FILE", help="With --data: other data, to be told from it.")
@output_options("ADAPTER-report.html", overwrite="Replace that file.", metavar="FILE")
def command(
    adapter: str,
    eval: str | None,
    examples: str | None,
    sweep: str | None,
    influence: str | None,
    data: tuple[str, ...],
    ood: tuple[str, ...],
    output: OutputOptions,
) -> None:
    """Write a report on ADAPTER: one HTML file that opens anywhere, without a network.

    What was trained and how; the table of `eval`; reliability diagrams; risk against coverage, with the threshold that
    `sweep --risk` promised; how other data differs; temperature and pruning, from `sweep`; σ and |m|/σ by layer and
    module; the training rows that stand out; and the examples that it is surest and least sure of. The questions of
    the data are in it. ADAPTER is a folder or a Hub id and is not modified.

    With --data the evaluation is that of `eval` with its defaults; for anything else run `eval` first.

    \b
      ivon-post eval adapter/ --data test.jsonl --json -o examples.jsonl > eval.json
      ivon-post report adapter/ --eval eval.json --sweep adapter-sweep/recommended.json
      ivon-post report adapter/ --data test.jsonl --ood other.jsonl
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.evaluation.evaluate import EvaluationData
    from axolotl_ivon.evaluation.run import run
    from axolotl_ivon.evaluation.variants import VariantChoice
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.report.findings import Findings
    from axolotl_ivon.report.page import check_output, page, save

    if eval and (data or ood):
        raise IVONError("--eval is what was evaluated already; leave --data and --ood out")
    if ood and not data:
        raise IVONError("--ood goes with --data, which is missing")
    path = output.path(adapter, "report.html")
    check_output(path, output.overwrite)
    with output.progress() as progress:
        files = (Path(file) if file else None for file in (eval, examples, sweep, influence))
        findings = Findings.read(Posterior.from_pretrained(adapter, progress).metadata, *files)
        if data:
            tau, ratio = PosteriorOptions(sweep).settings(adapter)
            names = ["base", "mean", "posterior", *(["mean-pruned", "posterior-pruned"] if ratio else [])]
            choice = VariantChoice(names, tau, ratio, findings.sweep)
            evaluated = run(adapter, EvaluationData(data, ood), choice, reporter=progress)
            findings = replace(findings, evaluation=evaluated.record, examples=list(evaluated.examples()))
        progress.begin("drawing")
        save(path, page(adapter, findings))
    output.finish({"output": str(path)}, path, then=["ivon-post", "card", adapter])
