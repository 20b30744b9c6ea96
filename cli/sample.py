"""`ivon-post sample`: draw adapters from a posterior."""

from __future__ import annotations

from typing import Any

import click

from ._options import Output, Point, adapter_argument, dtype_option, output_options, point_options, seed_option


@click.command("sample")
@adapter_argument
@click.option("-n", "members", type=int, default=8, show_default=True, help="How many adapters to draw.")
@seed_option("Member k depends on the seed and k alone, on every machine.")
@point_options(
    "Temperature: σ/√τ, see `temper`.  [default: 1]",
    "Prune this share by |m|/σ first, see `prune`.  [default: 0]",
)
@dtype_option("Of the draws.  [default: as the mean]")
@click.option("--include-mean", is_flag=True, help="Put the mean in as a member too, first.")
@click.option(
    "--serve",
    type=click.Choice(["vllm"]),
    help="Also write serve.sh, which serves every member, and print its command.",
)
@output_options("ADAPTER-samples-N, beside ADAPTER")
def command(
    adapter: str, members: int, seed: int, point: Point, serve: str | None, output: Output, **options: Any
) -> None:
    """Draw an ensemble from ADAPTER: a folder of complete PEFT adapters, sample-0000 and so on.

    Each loads with PeftModel.from_pretrained, and in vLLM with --lora-modules sample-0000=DIR/sample-0000.
    ensemble.json says where they came from. ADAPTER is a folder or a Hub id and is not modified.

    \b
      ivon-post sample adapter/ -n 8 --serve vllm -o ensemble/
      sh ensemble/serve.sh --port 8000 &
      ivon-post generate ensemble/ --prompts test.jsonl -n 64 --endpoint http://localhost:8000
    """
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.posterior.sample import sample

    tau, ratio = point.settings()
    path = output.target([adapter], f"samples-{members}")
    with output.progress() as progress:
        posterior = Posterior.from_pretrained(adapter, progress)
        if serve:
            from axolotl_ivon.generation.serve import Ensemble, served_rank

            served_rank(posterior.config)  # refused before anything is drawn
        if ratio:
            posterior = posterior.prune(ratio, progress=progress)
        posterior = posterior.temper(tau)
        names = sample(
            posterior, path, members, seed, source=adapter, overwrite=output.overwrite, progress=progress, **options
        )
    served: dict[str, str] = {}
    if serve:
        ensemble = Ensemble(path)
        served = {"serve": ensemble.serve_command(), "serve_script": str(ensemble.write_serve_script())}
    facts = {"output": str(path), "seed": seed, "members": names, **served}
    output.finish(facts, f"{len(names)} adapters, seed {seed}", path, *served.values())
