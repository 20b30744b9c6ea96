"""`ivon-post card`: the model card of an adapter, with what was measured."""

from __future__ import annotations

from pathlib import Path

import click

from ._options import Terminal, adapter_argument, terminal_options


@click.command("card")
@adapter_argument
@click.option("--results", metavar="FILE", help="What `ivon-post eval --json` printed for ADAPTER.")
@click.option("--recommended", metavar="FILE", help="The recommended.json of `ivon-post sweep` for ADAPTER.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="OWNER/NAME[/TASK]",
    help="The Hub's benchmark that a data file of --results is, one for each file, in order.  [default: its name]",
)
@terminal_options
def command(
    adapter: str, results: str | None, recommended: str | None, datasets: tuple[str, ...], terminal: Terminal
) -> None:
    """Write into ADAPTER's README.md what its posterior is, and what was measured.

    Training has written the first part. --results adds the table of `eval` with its standard errors, the results in
    the metadata (model-index) and .eval_results/ivon-ROW.yaml; --recommended the temperature, the pruning ratio and
    the threshold that `sweep` chose. What others wrote in the card stays, and a second time changes nothing.

    \b
      ivon-post eval adapter/ --data test.jsonl --json > eval.json
      ivon-post card adapter/ --results eval.json --recommended adapter-sweep/recommended.json
    """
    from axolotl_ivon.inspect.card import add_results

    measured, swept = (Path(file) if file else None for file in (results, recommended))
    files = [str(path) for path in add_results(Path(adapter), measured, swept, datasets)]
    terminal.finish({"files": files}, *files, then=["hf", "upload", "OWNER/NAME", adapter])
