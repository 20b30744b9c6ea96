"""`ivon-post temper`: make a posterior narrower or wider."""

from __future__ import annotations

import math

import click

from . import _options as options


@click.command("temper", cls=options.Sectioned)
@options.adapter_argument
@click.option(
    "--tau",
    type=float,
    help="Temperature above 0; relative to the adapter's own τ, inf gives the mean.  [required, unless --recommended]",
)
@options.recommended_option("the temperature")
@options.output_options("ADAPTER-tau-TAU, beside ADAPTER")
def command(adapter: str, tau: float | None, recommended: str | None, output: options.OutputOptions) -> None:
    """Make a posterior narrower or wider.

    Divides σ of ADAPTER by √τ: at τ = 1 the posterior is as it is, above 1 it is narrower, at inf it is the mean alone.
    τ scales the effective sample size λ, as in the IVON-LoRA paper (arXiv 2506.14280). The earlier workshop paper
    (arXiv 2411.04421) multiplies the variance by its τ instead: its τ is 1/τ here.

    Temperatures multiply: 2 after 2 is 4. ADAPTER is a folder or a Hub id and is not modified.
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.posterior.posterior import Posterior

    if tau is None and recommended is None:
        raise IVONError("there is no temperature; give --tau, or --recommended")
    value = options.PosteriorOptions(recommended or False, tau).settings(adapter, output).tau
    path = output.target([adapter], f"tau-{value:g}")
    with output.progress() as progress:
        source = Posterior.from_pretrained(adapter, progress)
        posterior = source.temper(value)
        posterior.save_pretrained(path, output.overwrite, progress)
        if posterior.tau == source.tau:
            progress.notify(f"τ {value:g} changes nothing: {path} holds {adapter} as it was")
    facts = {"output": str(path), "tau": "inf" if math.isinf(posterior.tau) else posterior.tau}
    then = ["ivon-post", "eval", path, "--data", "FILE.jsonl"]
    output.finish(facts, f"τ is {posterior.tau:g}", path, then=then)
