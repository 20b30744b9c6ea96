"""`ivon-post fit`: a posterior for an adapter that was trained without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    OutputOptions,
    Sectioned,
    adapter_argument,
    as_one,
    choice_option,
    data_option,
    limit_option,
    model_options,
    output_options,
    seed_option,
)
from ._tables import as_number, number

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading


class Prior(click.ParamType):
    """`empirical`, or a number."""

    name = "empirical|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """Return the number, or `empirical`."""
        try:
            return value if value == "empirical" else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither empirical nor a number", param, ctx)


@click.command("fit", cls=Sectioned)
@adapter_argument
@data_option
@choice_option(
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
@click.option(
    "--prior",
    type=Prior(),
    default="empirical",
    show_default=True,
    help="Prior, as `ivon_prior` in training: empirical, or its precision over λ.",
)
@click.option(
    "--prior-strength", type=float, default=1.0, show_default=True, help="Factor on the prior's precision (κ)."
)
@click.option("--tolerance", type=float, help="Nats by which tfb may raise the NLL.  [default: 0.01]")
@limit_option
@seed_option("Seed of draws, labels and order.")
@model_options
@output_options("ADAPTER-fitted, beside ADAPTER")
@as_one("settings", dict, "method", "empirical", "ess", "validation", "prior", "prior_strength", "tolerance", "seed")
def command(
    adapter: str, data: Sequence[str], settings: dict[str, Any], loading: Loading, output: OutputOptions, **options: Any
) -> None:
    """Fit a posterior (σ) around an existing adapter.

    Finds σ for every weight of ADAPTER, however it was trained; the weights stay as they are. --data is what it was
    trained on: chat JSONL, of which the assistant's turns count, or the labels of a classifier. The result is a copy of
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
        options |= {"loading": loading, "refit": True, "state": state, "reporter": progress}
        posterior = fit(adapter, data, **settings, **options)
        save(posterior, path, output.overwrite, progress, state)
    facts = summary(posterior)
    header = {name: as_number(value) for name, value in posterior.metadata.items()}
    line = (
        f"σ of {facts['weights']:,} weights by {settings['method']}: median {number(facts['sigma_median'])}, "
        f"|m|/σ {number(facts['snr_median'])}"
    )
    then = ["ivon-post", "eval", path, "--data", "TEST.jsonl"]
    output.finish({"output": str(path), **facts, "header": header}, line, path, then=then)
