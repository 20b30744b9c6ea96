"""`ivon-post card`: the model card of an adapter, with what was measured."""

from __future__ import annotations

from pathlib import Path

import click

from . import _options as options


@click.command("card", cls=options.Sectioned)
@options.adapter_argument
@click.option("--results", metavar="FILE", help="Results to add: what `ivon-post eval --json` printed for ADAPTER.")
@click.option(
    "--recommended",
    cls=options.RecommendedOption,
    help="Recommendation to add, or none.  [default: recommended.json in ADAPTER, if it is there]",
)
@click.option(
    "--dataset",
    "datasets",
    cls=options.Detail,
    of="results",
    multiple=True,
    metavar="OWNER/NAME[/TASK]",
    help="Hub id of the benchmark in a data file of --results. Repeatable, in the files' order.  [default: its name]",
)
@options.terminal_options
def command(
    adapter: str,
    results: str | None,
    recommended: str | bool | None,
    datasets: tuple[str, ...],
    terminal: options.Terminal,
) -> None:
    """Add measured results to the model card.

    The card is ADAPTER's README.md, where training has described the posterior. --results adds the table of `eval` with
    its standard errors, the results in the metadata (model-index) and .eval_results/ivon-ROW.yaml. A recommendation
    adds what to predict with, its threshold, and Python that applies it. What others wrote in the card stays, and
    running the command again changes nothing.

    \b
      ivon-post eval adapter/ --data test.jsonl --json > eval.json
      ivon-post card adapter/ --results eval.json --recommended adapter-sweep/recommended.json
    """
    from axolotl_ivon.inspect.card import add_results

    swept = Path(recommended) if isinstance(recommended, str) else recommended is None
    written = add_results(Path(adapter), Path(results) if results else None, swept, datasets)
    files = [str(path) for path in written]
    terminal.finish({"files": files}, *files, then=["hf", "upload", "OWNER/NAME", adapter])
