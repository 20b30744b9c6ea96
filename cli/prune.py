"""`ivon-post prune`: weights that the posterior is least certain of become 0."""

from __future__ import annotations

import click

from . import _options as options


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from axolotl_ivon.posterior.prune import criteria

    return [name for name in criteria() if name.startswith(incomplete)]


@click.command("prune", cls=options.Sectioned)
@options.adapter_argument
@click.option("--ratio", type=float, help="Share of all weights to set to 0.  [default: 0.1]")
@options.option(
    "--criterion",
    default="snr",
    shell_complete=_complete,
    help="Which weights go first: the smallest |m|/σ (snr), the largest σ (sigma), the smallest |m| (magnitude), "
    "random ones (random), or those of a plugin's criterion.",
)
@options.choice_option(
    "--scope", ["adapter", "tensor"], "Rank the weights of the whole adapter, or prune the same share of every tensor."
)
@options.recommended_option("the ratio")
@options.output_options("ADAPTER-pruned-RATIO, beside ADAPTER")
def command(
    adapter: str,
    ratio: float | None,
    criterion: str,
    scope: str,
    recommended: str | None,
    output: options.OutputOptions,
) -> None:
    """Set the least certain weights to 0.

    Afterwards mean and σ of round(RATIO × weights) weights are 0, or of as many as were pruned before if that is more:
    pruning 0.1 twice is pruning 0.1. ADAPTER is a folder or a Hub id and is not modified.
    """
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.posterior.prune import Pruning

    posterior_options = options.PosteriorOptions(recommended or False, ratio=ratio)
    share = posterior_options.settings(adapter, output, default_ratio=0.1).ratio
    Pruning(share, criterion, scope)  # refuses what is unknown or out of range, before anything is read
    path = output.target([adapter], f"pruned-{share:g}")
    with output.progress() as progress:
        source = Posterior.from_pretrained(adapter, progress)
        posterior = source.prune(share, criterion, scope, reporter=progress)
        posterior.save_pretrained(path, output.overwrite, progress)
        pruned, weights = sum(posterior.pruned().values()), posterior.mean.weights
        had = sum(source.pruned().values())
        if pruned == had:
            before = f"; {had:,} of {weights:,} weights were 0 before" if had else ""
            progress.notify(f"ratio {share:g} prunes nothing{before}: {path} holds {adapter} as it was")
        elif share == 1:
            all_is_lora = all(".lora_" in key and "magnitude" not in key for key in posterior.mean)
            then_what = ": with it the base model is as it was before training" if all_is_lora else ""
            progress.notify(f"ratio 1 prunes every weight of {path}{then_what}")
    facts = {"output": str(path), "ratio": share, "criterion": criterion, "scope": scope}
    told = f"{pruned:,} of {weights:,} weights are 0 ({pruned / max(weights, 1):.2%}), by {criterion}"
    then = ["ivon-post", "eval", path, "--data", "FILE.jsonl"]
    output.finish({**facts, "pruned": pruned, "weights": weights}, told, path, then=then)
