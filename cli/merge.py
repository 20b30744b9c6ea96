"""`ivon-post merge`: an adapter and its base model made one model."""

from __future__ import annotations

from typing import Any

import click

from ._options import (
    OutputOptions,
    PosteriorOptions,
    adapter_argument,
    base_model_option,
    dtype_option,
    output_options,
    point_options,
)


@click.command("merge")
@adapter_argument
@click.option(
    "--sample-seed", type=int, metavar="K", help="Merge a draw instead of the mean: member 0 of `sample --seed K`."
)
@point_options(
    "Temperature of that draw: σ/√τ, see `temper`.  [default: 1]",
    "Prune this share of the weights by |m|/σ first, see `prune`.  [default: 0]",
)
@base_model_option
@dtype_option("Of the merged model.  [default: the base model's]")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest safetensors file.")
@output_options("ADAPTER-merged, beside ADAPTER")
def command(
    adapter: str,
    sample_seed: int | None,
    point: PosteriorOptions,
    output: OutputOptions,
    max_shard_size: str,
    **options: Any,
) -> None:
    """Merge the posterior mean of ADAPTER, or one draw, into its base model.

    Writes a model that transformers loads, with its tokenizer. Works without σ too, for the mean. ADAPTER is a folder
    or a Hub id and is not modified.
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.models.merge import check_merge, choose_weights, merge
    from axolotl_ivon.posterior.adapter import Adapter

    if point.tau is not None and sample_seed is None:
        raise IVONError(f"--tau {point.tau:g}: the mean has no temperature; give --sample-seed too, or leave --tau out")
    path = output.target([adapter], "merged")
    tau, ratio = point.settings(adapter)
    pruned = ratio if ratio or point.ratio is not None else None
    options["max_shard_size"] = max_shard_size
    with output.progress() as progress:
        held = Adapter(adapter)
        check_merge(held, **options)
        tensors = choose_weights(held, pruned, sample_seed, tau, progress)
        merge(held, tensors, path, overwrite=output.overwrite, reporter=progress, **options)
    output.finish({"output": str(path)}, path, then=["vllm", "serve", path])
