"""`ivon-post report`: one page about an adapter, to show to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._options import Output, evaluation_options, output_as_one, recommended_option
from ._progress import silence_libraries


@click.command("report")
@evaluation_options
@click.option("--ood", multiple=True, metavar="FILE", help="Other data, to be told from --data; several times.")
@click.option("--calibrate", metavar="FILE", help="Validation data: adds the rows at a fitted temperature.")
@click.option("--results", metavar="FILE", help="What `ivon-post eval --json` printed, instead of evaluating again.")
@click.option(
    "--examples", metavar="FILE", help="The JSONL that the same `eval` wrote with -o.  [default: what --results names]"
)
@click.option("--tau", type=float, help="Temperature of the posterior: σ/√τ; inf is the mean.  [default: 1]")
@click.option("--prune-ratio", "ratio", type=float, help="Adds rows without this share of the weights.  [default: 0]")
@recommended_option("τ and the ratio, the trade-off and the promised threshold")
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
    output: Output,
    **loading: Any,
) -> None:
    """Write a report on ADAPTER: one HTML file that opens anywhere, without a network.

    What was trained and how; the table of `eval`; reliability diagrams; risk against coverage, with the threshold that
    `sweep --risk` promised; how other data (--ood) differs; temperature and pruning, from `sweep` (--recommended); σ
    and |m|/σ by layer and module; and the examples that it is surest and least sure of. The questions of the data are
    in it. ADAPTER is a folder or a Hub id and is not modified.

    \b
      ivon-post report adapter/ --data test.jsonl --ood other.jsonl --recommended adapter-sweep/recommended.json
      ivon-post eval adapter/ --data test.jsonl -o examples.jsonl --json > eval.json
      ivon-post report adapter/ --results eval.json
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.report.measured import measure, read
    from axolotl_ivon.report.page import check_output, page, save

    if results and (data or ood or calibrate):
        raise IVONError("--results is what was evaluated already; leave --data, --ood and --calibrate out")
    if not results and (ood or calibrate) and not data:
        raise IVONError("--ood and --calibrate go with --data, which is missing")
    path = Path(output.output) if output.output else _beside(Path(adapter))
    check_output(path, output.overwrite)
    with output.progress() as progress:
        files = (Path(file) if file else None for file in (results, examples, recommended))
        known = read(Posterior.from_pretrained(adapter, progress).metadata, *files)
        if data:
            progress.begin("loading the base model")
            silence_libraries()
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
                **loading,
            )
        progress.begin("drawing")
        save(path, page(adapter, known))
    output.finish({"output": str(path)}, path)


# What was evaluated may be read instead.
next(param for param in command.params if param.name == "data").required = False


def _beside(adapter: Path) -> Path:
    """Return where the report goes by default: beside the adapter, or for a Hub id here."""
    if not adapter.is_dir():
        return Path(f"{adapter.name}-report.html")
    named = adapter if adapter.name not in ("", "..") else adapter.resolve()
    return named.parent / f"{named.name}-report.html"
