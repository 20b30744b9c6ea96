"""`ivon-post sample`: draw adapters from a posterior."""

from __future__ import annotations

import math

import click

from . import _options as options

_LARGE = 10**9  # bytes; a larger ensemble is announced before it is written


@click.command("sample", cls=options.Sectioned)
@options.adapter_argument
@options.option("-n", "members", type=int, default=8, help="Number of adapters to draw.")
@options.seed_option("Seed of the draws. Member k depends only on the seed and k, on every machine.")
@options.point_options()
@click.option("--include-mean", is_flag=True, help="Make the mean the first member.")
@click.option(
    "--serve",
    type=click.Choice(["vllm"]),
    help="Also write serve.sh, which serves every member, and print its command. All modules then get one "
    "rank and scaling.",
)
@options.output_options("ADAPTER-samples-N, beside ADAPTER")
def command(
    adapter: str,
    members: int,
    seed: int,
    posterior_options: options.PosteriorOptions,
    include_mean: bool,
    serve: str | None,
    output: options.OutputOptions,
) -> None:
    """Draw an ensemble of adapters from a posterior.

    Uses the τ that ADAPTER's recommended.json has for draws, even if it recommends the mean. Writes a folder of
    complete PEFT adapters: sample-0000 and so on. Each loads with PeftModel.from_pretrained, and in vLLM with
    --lora-modules sample-0000=DIR/sample-0000. ensemble.json says where they came from. ADAPTER is a folder or a Hub id
    and is not modified.

    \b
      ivon-post sample adapter/ -n 8 --serve vllm -o ensemble/
      sh ensemble/serve.sh --port 8000 &
      ivon-post generate ensemble/ --prompts test.jsonl -n 64 --endpoint http://localhost:8000
    """
    from axolotl_ivon.posterior.posterior import Posterior
    from axolotl_ivon.posterior.sample import EnsemblePlan, sample
    from axolotl_ivon.storage.atomic import in_bytes

    plan = EnsemblePlan(members, seed, include_mean=include_mean, one_scaling=bool(serve))
    tau, ratio, *_ = posterior_options.settings(adapter, output, "draws")
    path = output.target([adapter], f"samples-{members}")
    with output.progress() as progress:
        posterior = Posterior.from_pretrained(adapter, progress)
        if serve:
            from axolotl_ivon.generation.ensemble import Ensemble, served_rank

            served_rank(plan.config(posterior), posterior.mean)  # refused before anything is drawn
        posterior = posterior.prune(ratio, reporter=progress).temper(tau)
        if (size := plan.size(posterior)) >= _LARGE:
            progress.notify(f"{members:,} adapters take {in_bytes(size)} in {path}")
        names = sample(posterior, path, plan, adapter, output.overwrite, progress)
        if math.isinf(posterior.tau):
            progress.notify("τ is inf: every draw is the mean")
    served: dict[str, str] = {}
    if serve:
        ensemble = Ensemble(path)
        served = {"serve": ensemble.serve_command(), "serve_script": str(ensemble.write_serve_script())}
    document = {"output": str(path), "seed": seed, "members": names, **served}
    then = ["sh", served["serve_script"], "--port", 8000] if served else []
    line = f"{len(names)} adapter{'s' if len(names) > 1 else ''}, seed {seed}"
    output.finish(document, line, path, *served.values(), then=then)
