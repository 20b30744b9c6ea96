"""`ivon-post merge`: an adapter and its base model made one model."""

from __future__ import annotations

from typing import Any

import click

from ._options import Output, adapter_argument, base_model_option, dtype_option, output_options
from ._progress import silence_libraries


@click.command("merge")
@adapter_argument
@click.option("--prune-ratio", type=float, help="Prune this share of the weights by |m|/σ first.")
@click.option(
    "--sample-seed", type=int, metavar="K", help="Merge a draw instead of the mean: member 0 of `sample --seed K`."
)
@base_model_option
@dtype_option("Of the merged model.  [default: the base model's]")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest safetensors file.")
@output_options("ADAPTER-merged, beside ADAPTER")
def command(adapter: str, prune_ratio: float | None, sample_seed: int | None, output: Output, **options: Any) -> None:
    """Merge the posterior mean of ADAPTER, or one draw, into its base model.

    Writes a model that transformers loads, with its tokenizer. Works without σ too, for the mean. ADAPTER is a folder
    or a Hub id and is not modified.
    """
    from axolotl_ivon.models.merge import choose_weights, merge
    from axolotl_ivon.posterior.adapter import Adapter

    path = output.target([adapter], "merged")
    with output.progress() as progress:
        held = Adapter(adapter)
        tensors = choose_weights(held, prune_ratio, sample_seed, progress)
        silence_libraries()
        merge(held, tensors, path, overwrite=output.overwrite, progress=progress, **options)
    output.finish({"output": str(path)}, path)
