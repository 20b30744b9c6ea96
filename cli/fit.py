"""`ivon-post fit`: a posterior for an adapter that was trained without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    OutputOptions,
    adapter_argument,
    as_one,
    batch_option,
    choice_option,
    choices_option,
    data_option,
    limit_option,
    model_options,
    output_options,
    samples_option,
    seed_option,
    task_option,
)
from ._tables import as_number, number

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading


class Prior(click.ParamType):
    """`empirical`, or a number."""

    name = "empirical|δ"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """Return the number, or `empirical`."""
        try:
            return value if value == "empirical" else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither empirical nor a number", param, ctx)


@click.command("fit")
@adapter_argument
@data_option
@choice_option(
    "--method",
    ["ivon", "fisher", "tfb"],
    "ivon: variational, IVON's updates of the precision with the mean held. fisher: one pass at the mean, the diagonal "
    "Laplace approximation. tfb: the widest noise on A within a tolerance (training-free Bayesianization).",
)
@click.option("--empirical", is_flag=True, help="Labels of the data, not drawn from the model (ivon and fisher).")
@click.option("--ess", type=float, metavar="λ", help="Effective sample size.  [default: by N, as in training]")
@click.option("--validation", metavar="FILE", help="Choose λ: the one whose averaged draws have the lowest NLL here.")
@click.option(
    "--prior",
    type=Prior(),
    metavar="empirical|δ",
    default="empirical",
    show_default=True,
    help="As `ivon_prior` in training.",
)
@click.option(
    "--prior-strength",
    type=float,
    metavar="κ",
    default=1.0,
    show_default=True,
    help="A factor on the prior's precision.",
)
@click.option("--anchor", metavar="FILE", help="Data on which tfb finds the width.  [default: --data]")
@click.option("--tolerance", type=float, help="Nats by which tfb may raise the NLL there.  [default: 0.01]")
@click.option("--refit", is_flag=True, help="Fit an adapter that has a σ: the copy gets the new one.")
@task_option
@choices_option
@limit_option
@samples_option
@seed_option("Seed of draws, labels and order.")
@model_options
@batch_option("Examples in a batch; fewer when the memory runs out.")
@output_options("ADAPTER-fitted, beside ADAPTER")
@as_one(
    "settings",
    dict,
    "method",
    "empirical",
    "ess",
    "validation",
    "prior",
    "prior_strength",
    "anchor",
    "tolerance",
    "samples",
    "seed",
)
def command(
    adapter: str, data: Sequence[str], settings: dict[str, Any], loading: Loading, output: OutputOptions, **options: Any
) -> None:
    """Give ADAPTER, however it was trained, a posterior: σ for every weight, around weights that stay as they are.

    --data is what it was trained on: chat JSONL, of which the assistant's turns count, or the labels of a classifier.
    The result is a copy of ADAPTER with ivon_sigma.safetensors in it, for all that `ivon-post` does.

    λ says how much the data count, as in training; --task and --choices say how --validation or --anchor are predicted,
    see `eval`. An interrupted fit goes on where it stopped when it is started again.

    \b
      ivon-post fit adapter/ --data train.jsonl
      ivon-post fit adapter/ --data train.jsonl --validation validation.jsonl
      ivon-post fit owner/adapter --data train.jsonl --method tfb --tolerance 0.005 -o posterior/
    """
    from axolotl_ivon.fitting.fit import Settings, fit, save, summary

    Settings(**settings)
    path = output.target([adapter], "fitted")
    state = path.with_name(f".{path.name}.fit")
    with output.progress() as progress:
        posterior = fit(
            adapter,
            data,
            **settings,
            **options,
            loading=loading,
            state=state,
            reporter=progress,
        )
        save(posterior, path, output.overwrite, progress, state)
    facts = summary(posterior)
    header = {name: as_number(value) for name, value in posterior.metadata.items()}
    line = (
        f"σ of {facts['weights']:,} weights by {settings['method']}: median {number(facts['sigma_median'])}, "
        f"|m|/σ {number(facts['snr_median'])}"
    )
    then = ["ivon-post", "eval", path, "--data", "TEST.jsonl"]
    output.finish({"output": str(path), **facts, "header": header}, line, path, then=then)
