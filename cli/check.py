"""`ivon-post check`: the diagnosis of a run, or the forecast of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ._options import Sectioned, Terminal, limit_option, model_options, terminal_options
from ._progress import silence_libraries
from ._tables import emit, print_facts

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading


@click.command("check", cls=Sectioned)
@click.argument("target", metavar="ADAPTER|YAML")
@click.option("--data", "-d", multiple=True, metavar="FILE", help="Chat JSONL on which draws and mean are compared.")
@limit_option
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that run the YAML."
)
@model_options
@terminal_options
def command(
    target: str,
    data: Sequence[str],
    limit: int | None,
    processes: int,
    terminal: Terminal,
    loading: Loading,
) -> None:
    """Diagnose a run, or forecast one from its YAML.

    For an adapter it says whether the weights moved, whether σ was learned, how wide the draws are, and with --data
    whether their average predicts better than the mean. For an axolotl YAML it says, before anything is loaded, the
    number of examples N, the steps, the effective sample size λ, the learning rate, and how far a weight can travel.

    \b
      ivon-post check out/ --data validation.jsonl
      ivon-post check train.yaml
    """
    with terminal.progress() as progress:
        if target.endswith((".yaml", ".yml")):
            from axolotl_ivon.integrations.forecast import forecast

            if data:
                raise click.UsageError("--data goes with an adapter, not with a YAML.")
            facts = forecast(target, processes)
        else:
            from axolotl_ivon.inspect.diagnosis import diagnose

            facts = diagnose(target, progress)
            if data:
                progress.begin("loading the base model")
                silence_libraries()
                from axolotl_ivon.evaluation.against_mean import draws_against_mean
                from axolotl_ivon.evaluation.evaluate import EvaluationData, Sampling

                files = EvaluationData(data, limit=limit)
                facts["data"] = draws_against_mean(target, files, Sampling(), loading, progress)
                facts["findings"] += [row["finding"] for row in facts["data"]]
    if terminal.as_json:
        emit(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    """Print the figures, then what they mean, a line each: ✓ where nothing need be done, ! where something may."""
    from axolotl_ivon.errors import printable

    shown = {key: value for key, value in facts.items() if key not in ("findings", "unknown", "data")}
    print_facts(
        {
            name: "unknown" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            for name, value in shown.items()
        }
    )
    for finding in facts["findings"]:
        click.echo(printable(f"{'✓' if finding['good'] else '!'} {finding['text']}"))
    for why in facts.get("unknown", ()):
        click.echo(printable(f"? {why}"))
