"""`ivon-post fit`: a posterior for an adapter that was trained without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from . import _options as options
from ._tables import as_number, number


def _prior(value: str) -> str | float:
    try:
        return value if value == "empirical" else float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither empirical nor a number") from error


@click.command("fit", cls=options.Sectioned)
@options.adapter_argument
@options.data_option
@options.choice_option(
    "--method",
    ["fisher", "ivon", "tfb"],
    "How the width is found. fisher: the diagonal Laplace approximation, in one pass at the mean. ivon: variational, "
    "IVON's updates of the precision at a fixed mean. tfb: the widest noise on A within --tolerance.",
)
@click.option(
    "--empirical", is_flag=True, help="Use the labels of the data, not labels drawn from the model (fisher and ivon)."
)
@click.option(
    "--ess", type=float, help="Effective sample size (λ).  [default: by the number of examples, as in training]"
)
@click.option(
    "--validation",
    metavar="FILE",
    help="Data on which the effective sample size (fisher, ivon) or the width (tfb) is chosen by the NLL of averaged "
    "draws.  [default: for tfb, --data]",
)
@options.option(
    "--prior",
    type=_prior,
    metavar="EMPIRICAL|NUMBER",
    default="empirical",
    help="Prior, as `ivon_prior` in training: empirical, or its precision over λ.",
)
@options.option("--prior-strength", type=float, default=1.0, help="Factor on the prior's precision (κ).")
@click.option("--tolerance", type=float, help="Nats by which tfb may raise the NLL.  [default: 0.01]")
@options.limit_option
@options.seed_option("Seed of draws, labels and order.")
@options.model_options
@options.output_options("ADAPTER-fitted, beside ADAPTER")
@options.as_one(
    "settings", dict, "method", "empirical", "ess", "validation", "prior", "prior_strength", "tolerance", "seed"
)
def command(
    adapter: str,
    data: Sequence[str],
    settings: dict[str, Any],
    limit: int | None,
    loading: options.Loading,
    output: options.OutputOptions,
) -> None:
    """Fit a posterior (σ) around an existing adapter.

    Finds σ for every weight of ADAPTER, however it was trained; the weights stay as they are. --data is what it was
    trained on, as chat JSONL: the assistant's turns count, or a classifier's labels. The result is a copy of
    ADAPTER with ivon_sigma.safetensors, on which all of `ivon-post` works.

    The effective sample size λ says how much the data count, as in training. An interrupted fit continues where it
    stopped when it is started again.

    \b
      ivon-post fit adapter/ --data train.jsonl
      ivon-post fit adapter/ --data train.jsonl --validation validation.jsonl
      ivon-post fit owner/adapter --data train.jsonl --method tfb --tolerance 0.005 -o posterior/
    """
    from axolotl_ivon.fitting.fit import fit, save, summary
    from axolotl_ivon.fitting.problem import Settings

    Settings(**settings)
    path = output.target([adapter], "fitted")
    state = path.with_name(f".{path.name}.fit")
    with output.progress() as progress:
        # What is written is a copy, so any σ may be replaced.
        how: dict[str, Any] = {"limit": limit, "loading": loading, "refit": True, "state": state, "reporter": progress}
        posterior = fit(adapter, data, **settings, **how)
        save(posterior, path, output.overwrite, progress, state)
    facts = summary(posterior)
    header = {name: as_number(value) for name, value in posterior.metadata.items()}
    line = (
        f"σ of {facts['weights']:,} weights by {settings['method']}: median {number(facts['sigma_median'])}, "
        f"|m|/σ {number(facts['snr_median'])}"
    )
    then = ["ivon-post", "eval", path, "--data", "TEST.jsonl"]
    output.finish({"output": str(path), **facts, "header": header}, line, path, then=then)
