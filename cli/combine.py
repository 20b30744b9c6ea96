"""`ivon-post combine`: several posteriors become one."""

from __future__ import annotations

import click

from . import _options as options


@click.command("combine", cls=options.Sectioned)
@click.argument("adapters", metavar="ADAPTER…", nargs=-1, required=True)
@options.choice_option(
    "--method",
    ["precision", "linear", "cat"],
    "How to combine. precision: the product of the Gaussians. linear: the weighted mean of the factors. cat: the exact "
    "weighted sum of the updates, by concatenation; ranks and targets may differ.",
)
@click.option(
    "--weights",
    type=options.numbers,
    metavar="W,W,…",
    help="A weight for each ADAPTER: the power of its Gaussian, or its weight in a sum.  [default: 1, or 1/n in a sum]",
)
@options.output_options("ADAPTER-combined, beside the first ADAPTER")
def command(
    adapters: tuple[str, ...], method: str, weights: tuple[float, ...] | None, output: options.OutputOptions
) -> None:
    """Combine several posteriors into one.

    The ADAPTERs share one base model. With precision, means are weighted by 1/σ² and precisions add up. What ADAPTERs
    share is counted once: a fixed prior, and the adapter that they continue from (ivon_prior), which need not be given.
    Use it for adapters that were trained on different parts of the data. The other methods are PEFT's ways to weight
    adapters, with σ carried along. No ADAPTER is modified.
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
