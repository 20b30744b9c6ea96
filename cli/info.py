"""`ivon-post info`: what is in an adapter folder."""

from __future__ import annotations

from typing import Any

import click

from . import _options as options
from ._tables import as_number, emit, number, print_facts, print_table


@click.command("info", cls=options.Sectioned)
@options.adapter_argument
@options.option("--ratio", type=float, default=0.1, help="Pruning ratio whose effect is shown.")
@options.terminal_options
def command(adapter: str, ratio: float, terminal: options.Terminal) -> None:
    """Show what is in an adapter.

    ADAPTER is a PEFT folder, a checkpoint or a Hub id. Prints for every module and for the whole adapter the median
    of σ, the median of the signal-to-noise ratio |m|/σ, and the share of weights that `prune --ratio` would set to 0;
    then what training wrote into the header of ivon_sigma.safetensors.
    """
    from axolotl_ivon.decisions.recommendation import recommended_for
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.inspect.info import describe
    from axolotl_ivon.models.merge import PROMPT_KINDS

    with terminal.progress() as progress:
        facts = describe(adapter, ratio, reporter=progress)
        try:
            taken = recommended_for(adapter)
        except IVONError as error:  # the other facts hold all the same
            taken = None
            progress.notify(str(error))
    facts["recommended"] = taken and taken.describe()
    if terminal.as_json:
        facts["header"] = {name: as_number(value) for name, value in facts["header"].items()}
        emit(facts)
        return
    columns = ["module", "weights"]
    lines = [[row["module"], f"{row['weights']:,}"] for row in facts["modules"]]
    noisy = facts.get("weights_with_sigma", 0) > 0
    if noisy:
        columns += ["median σ", "median |m|/σ", f"pruned at {facts['prune_ratio']:g}"]
        for line, row in zip(lines, facts["modules"], strict=True):
            line += [number(row["sigma_median"]), number(row["snr_median"]), f"{row['pruned']:.1%}"]
    print_table(columns, lines)
    own = {
        "adapter": facts["adapter"],
        "base model": str(facts["base_model"]),
        "type": f"{facts['peft_type']}, r {facts['r']}, alpha {facts['lora_alpha']}",
        "tensors": f"{facts['tensors']:,} ({', '.join(facts['dtypes'])})",
        "weights": f"{facts['weights']:,}",
    }
    print_facts(own | ({"recommended": taken.describe()} if taken else {}) | facts["header"])
    if noisy:
        names = {"0": "min", "0.5": "median", "1": "max"}
        columns = [names.get(quantile, f"{float(quantile):.0%}") for quantile in facts["sigma"]]
        rows = {"σ": facts["sigma"], "|m|/σ": facts["snr"]}
        print_table(["", *columns], [[name, *map(number, values.values())] for name, values in rows.items()])
        by = f"{facts['prune_ratio']:g} by {facts['prune_criterion']}"
        click.echo(f"{facts['would_prune']:,} weights are 0 after pruning {by}\n")
        _print_histogram(facts["snr_histogram"])
        terminal.suggest("ivon-post", "eval", adapter, "--data", "FILE.jsonl")
    elif facts["posterior"]:
        click.echo("σ is 0 everywhere: there is only the mean, and neither draws nor a ratio |m|/σ to prune by.")
        terminal.suggest("ivon-post", "merge", adapter)
    elif facts["peft_type"] in PROMPT_KINDS:
        click.echo("It changes the prompt and no weight, so there is nothing to merge, and no σ of its weights.")
    else:
        click.echo(
            "There is no ivon_sigma.safetensors: `info`, `merge`, `predict`, `eval --rows base,mean` and "
            "`generate --mean` work on this adapter, and `fit` gives it one."
        )
        terminal.suggest("ivon-post", "merge", adapter)


def _print_histogram(histogram: dict[str, list[Any]]) -> None:
    """Draw the counts between powers of ten as bars."""
    counts = histogram["counts"]
    labels = ["0", *(f"{10**edge:.3g}" for edge in histogram["log10_edges"])]
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return
    click.echo("|m|/σ from")
    for i in range(filled[0], filled[-1] + 1):
        eighths = round(counts[i] / max(counts) * 40 * 8)
        bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
        click.echo(f"{labels[i]:>10} {bar:<40} {counts[i] / sum(counts):6.1%}")
