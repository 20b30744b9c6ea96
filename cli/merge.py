"""`ivon-post merge`: an adapter and its base model become one model."""

from __future__ import annotations

import math

import click

from axolotl_ivon.storage.format import DTYPES

from . import _options as options


@click.command("merge", cls=options.Sectioned)
@options.adapter_argument
@click.option(
    "--sample-seed", type=int, metavar="K", help="Merge a draw instead of the mean: member 0 of `sample --seed K`."
)
@options.point_options(tau="Temperature of that draw; relative to the adapter's own τ, see `temper`.  [default: 1]")
@options.base_model_option
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of the merged model.  [default: the base model's]")
@options.output_options("ADAPTER-merged, beside ADAPTER")
def command(
    adapter: str,
    sample_seed: int | None,
    posterior_options: options.PosteriorOptions,
    base_model: str | None,
    dtype: str | None,
    output: options.OutputOptions,
) -> None:
    """Merge an adapter into its base model.

    Merges the mean of ADAPTER, or one draw, and writes a model that transformers loads, with its tokenizer. The mean of
    an adapter without σ is merged, too. ADAPTER is a folder or a Hub id and is not modified. If the mean is recommended
    with a softmax temperature T, the merged model's logits are divided by T, so that its probabilities are calibrated
    in every runtime.
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.models.merge import check_merge, choose_weights, merge
    from axolotl_ivon.models.session import Loading
    from axolotl_ivon.posterior.adapter import Adapter

    if posterior_options.tau is not None and sample_seed is None:
        raise IVONError(
            f"--tau {posterior_options.tau:g}: the mean has no temperature; give --sample-seed too, or leave --tau out"
        )
    path = output.target([adapter], "merged")
    tau, ratio, rule, *_ = posterior_options.settings(adapter, output, "mean" if sample_seed is None else "draws")
    pruned = ratio if ratio or posterior_options.ratio is not None else None
    temperature = rule.temperature if sample_seed is None else 1.0
    loading = Loading(base_model, dtype=dtype or "auto")
    with output.progress() as progress:
        held = Adapter(adapter)
        check_merge(held, loading)
        if temperature != 1 and math.isfinite(tau):
            progress.say(f"the softmax temperature {temperature:.3g} is for draws at τ {tau:g}: the mean gets none")
            temperature = 1.0
        tensors = choose_weights(held, pruned, sample_seed, tau, progress)
        merge(held, tensors, path, loading, temperature=temperature, overwrite=output.overwrite, reporter=progress)
        if temperature != 1:
            progress.say(f"the logits are divided by the softmax temperature {temperature:.3g}")
    output.finish({"output": str(path), "temperature": temperature}, path, then=["vllm", "serve", path])
