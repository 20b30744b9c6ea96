"""`ivon-post combine`: several posteriors made one."""

from __future__ import annotations

import click

from ._options import Numbers, output_options, target
from ._progress import Progress
from ._tables import emit


@click.command("combine")
@click.argument("adapters", metavar="ADAPTER…", nargs=-1, required=True)
@click.option(
    "--method",
    type=click.Choice(["precision", "linear", "cat"]),
    default="precision",
    show_default=True,
    help="precision: product of the Gaussians. linear: weighted mean of the factors. cat: exact weighted sum of the "
    "updates, by concatenation; ranks and targets may differ.",
)
@click.option(
    "--weights", type=Numbers(), metavar="W,W,…", help="For linear and cat, one for each ADAPTER.  [default: 1/n each]"
)
@output_options("ADAPTER-combined, beside the first ADAPTER")
def command(
    adapters: tuple[str, ...],
    method: str,
    weights: tuple[float, ...] | None,
    output: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Combine the posteriors of several ADAPTERs over one base model into one.

    With precision, means are weighted by 1/σ² and precisions add up; a fixed prior that all share is counted
    once. Use it for adapters trained on different parts of the data. The other methods are PEFT's kinds of
    weighted adapters, with σ carried along. No ADAPTER is modified.
    """
    from axolotl_ivon.posterior.posterior import Posterior

    path = target(adapters, output, "combined", overwrite)
    with Progress(quiet) as progress:
        posteriors = [Posterior.from_pretrained(adapter, progress) for adapter in adapters]
        Posterior.combine(posteriors, method, weights).save_pretrained(path, overwrite, progress)
    if as_json:
        emit({"output": str(path), "method": method, "adapters": list(adapters)})
        return
    click.echo(path)
