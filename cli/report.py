"""`ivon-post report`: one page about an adapter, to show to others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from . import _options as options


@click.command("report", cls=options.Sectioned)
@options.adapter_argument
@click.option(
    "--eval", cls=options.Renamed, formerly=["--results"], metavar="FILE",
    help="Evaluation that `ivon-post eval --json` printed.",
)  # fmt: skip
@click.option(
    "--examples", metavar="FILE", help="Examples that the same `eval` wrote with -o.  [default: what --eval names]"
)
@click.option(
    "--sweep", cls=options.RecommendedOption, formerly=["--recommended"],
    help="Recommendation of training or of `ivon-post sweep`, or none.  [default: the adapter's own]",
)  # fmt: skip
@click.option("--influence", metavar="FILE", help="Scores that `ivon-post influence` wrote with -o.")
@click.option("--data", "-d", multiple=True, metavar="FILE", help="Data to evaluate on, without --eval. Repeatable.")
@options.output_options("ADAPTER-report.html", overwrite="Replace that file.", metavar="FILE")
def command(
    adapter: str,
    eval: str | None,
    examples: str | None,
    sweep: str | bool | None,
    influence: str | None,
    data: tuple[str, ...],
    output: options.OutputOptions,
) -> None:
    """Write one HTML page about an adapter.

    The page opens anywhere, without a network. It shows what was trained and how; the table of `eval`; reliability
    diagrams; risk against coverage, with the threshold of `sweep --risk`; how other data differs; temperature and
    pruning, from `sweep`; σ and |m|/σ by layer and module; the training rows that stand out; and the examples with the
    highest and lowest confidence. The questions of the data are in the page. ADAPTER is a folder or a Hub id and is not
    modified.

    With --data the evaluation is that of `eval` with its defaults; for anything else run `eval` first.

    \b
      ivon-post eval adapter/ --data test.jsonl --json -o examples.jsonl > eval.json
      ivon-post report adapter/ --eval eval.json --sweep adapter-sweep/recommended.json
      ivon-post report adapter/ --data test.jsonl
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.evaluation.evaluate import EvaluationData
    from axolotl_ivon.evaluation.run import run
    from axolotl_ivon.evaluation.variants import VariantChoice
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.report.findings import Findings
    from axolotl_ivon.report.page import page
    from axolotl_ivon.storage.atomic import check_file, new_file

    if eval and data:
        raise IVONError("--eval is evaluated already; leave --data out")
    posterior_options = options.PosteriorOptions(sweep)
    inputs = {"eval": eval, "examples": examples, "sweep": posterior_options.file, "influence": influence}
    path = output.path(adapter, "report.html", data=data, **inputs)
    check_file(path, output.overwrite)
    with output.progress() as progress:
        header = Posterior.from_pretrained(adapter, progress).metadata
        own = posterior_options.taken(adapter, output) if sweep is None else None
        files = (
            Path(file) if file else None
            for file in (eval, examples, own.path if own else posterior_options.file, influence)
        )
        findings = Findings.read(header, *files)
        if data:
            taken = own or posterior_options.taken(adapter, output)
            choice = taken.choice() if taken else VariantChoice()
            evaluated = run(
                adapter,
                EvaluationData(data, by_length=bool(taken and taken.rule.by_length)),
                choice,
                reporter=progress,
            )
            findings = replace(findings, evaluation=evaluated.record, examples=list(evaluated.examples()))
        progress.begin("drawing")
        with new_file(path) as temporary:
            temporary.write_text(page(adapter, findings), encoding="utf-8")
    output.finish({"output": str(path)}, path, then=["ivon-post", "card", adapter])
