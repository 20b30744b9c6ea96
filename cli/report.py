"""`ivon-post report`: one page about an adapter, to show to others."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    OutputOptions,
    PosteriorOptions,
    Renamed,
    Sectioned,
    evaluation_options,
    output_as_one,
    recommended_option,
)

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading


@click.command("report", cls=Sectioned)
@evaluation_options
@click.option("--ood", multiple=True, metavar="FILE", help="Other data, to be told from --data; several times.")
@click.option("--calibrate", metavar="FILE", help="Validation data: adds the rows at a fitted temperature.")
@click.option("--results", metavar="FILE", help="What `ivon-post eval --json` printed, instead of evaluating again.")
@click.option(
    "--examples", metavar="FILE", help="The JSONL that the same `eval` wrote with -o.  [default: what --results names]"
)
@click.option("--tau", type=float, help="Temperature of the posterior: σ/√τ; inf is the mean.  [default: 1]")
@click.option(
    "--ratio",
    type=float,
    cls=Renamed,
    formerly=["--prune-ratio"],
    help="Adds rows without this share of the weights.  [default: 0]",
)
@recommended_option("τ and the ratio, the trade-off and the promised threshold")
@click.option("--influence", metavar="FILE", help="What `ivon-post influence` wrote with -o: the training rows.")
@click.option("--output", "-o", metavar="FILE", help="Where to write.  [default: ADAPTER-report.html]")
@click.option("--overwrite", is_flag=True, help="Replace that file.")
@output_as_one
def command(
    adapter: str,
    data: tuple[str, ...],
    ood: tuple[str, ...],
    calibrate: str | None,
    results: str | None,
    examples: str | None,
    run: dict[str, Any],
    tau: float | None,
    ratio: float | None,
    recommended: str | None,
    influence: str | None,
    output: OutputOptions,
    loading: Loading,
    **encoding: Any,
) -> None:
    """Write one HTML page about an adapter.

    The page opens anywhere, without a network. It shows what was trained and how; the table of `eval`; reliability
    diagrams; risk against coverage, with the threshold of `sweep --risk`; how other data (--ood) differs; temperature
    and pruning, from `sweep` (--recommended); σ and |m|/σ by layer and module; the training rows that stand out
    (--influence); and the examples with the highest and lowest confidence. The questions of the data are in the page.
    ADAPTER is a folder or a Hub id and is not modified.

    \b
      ivon-post report adapter/ --data test.jsonl --ood other.jsonl --recommended adapter-sweep/recommended.json
      ivon-post eval adapter/ --data test.jsonl -o examples.jsonl --json > eval.json
      ivon-post report adapter/ --results eval.json
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.records.influence import load as read_influence
    from axolotl_ivon.report.measured import check_output, measure, read

    if results and (data or ood or calibrate):
        raise IVONError("--results is what was evaluated already; leave --data, --ood and --calibrate out")
    if not results and (ood or calibrate) and not data:
        raise IVONError("--ood and --calibrate go with --data, which is missing")
    tau, ratio = PosteriorOptions(recommended, tau, ratio).settings(adapter)
    path = output.path(adapter, "report.html")
    check_output(path, output.overwrite)
    with output.progress() as progress:
        files = (Path(file) if file else None for file in (results, examples, recommended))
        known = read(Posterior.from_pretrained(adapter, progress).metadata, *files)
        rows = [row.dump() for row in read_influence(influence, "influence")] if influence else []
        if data:
            known = measure(
                adapter,
                data,
                ood=ood,
                calibrate=calibrate,
                tau=tau,
                ratio=ratio,
                recommended=known.recommended,
                run=run,
                begin=progress.begin,
                notify=progress.notify,
                **encoding,
                **asdict(loading),
            )
        progress.begin("drawing")
        from axolotl_ivon.report.page import page, save

        save(path, page(adapter, replace(known, influence=rows)))
    output.finish({"output": str(path)}, path, then=["ivon-post", "card", adapter])


# What was evaluated may be read instead.
next(param for param in command.params if param.name == "data").required = False
