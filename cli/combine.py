"""`ivon-post combine`: several posteriors made one."""

from __future__ import annotations

import click

from ._options import Numbers, OutputOptions, choice_option, output_options


@click.command("combine")
@click.argument("adapters", metavar="ADAPTER…", nargs=-1, required=True)
@choice_option(
    "--method",
    ["precision", "linear", "cat"],
    "precision: product of the Gaussians. linear: weighted mean of the factors. cat: exact weighted sum of the "
    "updates, by concatenation; ranks and targets may differ.",
)
@click.option(
    "--weights",
    type=Numbers(),
    metavar="W,W,…",
    help="One for each ADAPTER: the power of a Gaussian, or the weight in a sum.  [default: 1 each, 1/n in a sum]",
)
@output_options("ADAPTER-combined, beside the first ADAPTER")
def command(adapters: tuple[str, ...], method: str, weights: tuple[float, ...] | None, output: OutputOptions) -> None:
    """Combine the posteriors of several ADAPTERs over one base model into one.

    With precision, means are weighted by 1/σ² and precisions add up; what ADAPTERS share is counted once: a fixed
    prior, and the adapter that they go on from (ivon_prior), which need not be given. Use it for adapters trained on
    different parts of the data. The other methods are PEFT's kinds of weighted adapters, with σ carried along. No
    ADAPTER is modified.
    """
    from axolotl_ivon.posterior.combine import shares
    from axolotl_ivon.posterior.posterior import Posterior

    shares(len(adapters), method, weights)
    path = output.target(adapters, "combined")
    with output.progress() as progress:
        posteriors = [Posterior.from_pretrained(adapter, progress) for adapter in adapters]
        Posterior.combine(posteriors, method, weights).save_pretrained(path, output.overwrite, progress)
    facts = {"output": str(path), "method": method, "adapters": list(adapters)}
    output.finish(facts, path, then=["ivon-post", "eval", path, "--data", "FILE.jsonl"])
