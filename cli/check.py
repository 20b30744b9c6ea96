"""`ivon-post check`: the diagnosis of a run, or the forecast of one."""

from __future__ import annotations

from collections.abc import Sequence

import click

from axolotl_ivon.storage.format import file_names

from . import _options as options
from ._tables import emit, print_facts


@click.command("check", cls=options.Sectioned)
@click.argument("target", metavar="ADAPTER|YAML")
@click.option("--data", "-d", multiple=True, metavar="FILE", help="Chat JSONL on which draws and mean are compared.")
@options.limit_option
@options.option("--processes", type=click.IntRange(min=1), default=1, help="Number of processes that will train.")
@options.model_options
@options.terminal_options
def command(
    target: str,
    data: Sequence[str],
    limit: int | None,
    processes: int,
    loading: options.Loading,
    terminal: options.Terminal,
) -> None:
    """Diagnose a run, or forecast one from its YAML.

    For an adapter it says whether the weights moved, whether σ was learned, how wide the draws are, and with --data
    whether their average predicts better than the mean. For an axolotl YAML it says, before anything is loaded, the
    number of examples N, the steps, the effective sample size λ, the learning rate α, and how far a weight can travel.

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
                from axolotl_ivon.evaluation.evaluate import EvaluationData, Sampling
                from axolotl_ivon.evaluation.run import run
                from axolotl_ivon.evaluation.variants import VariantChoice

                files, choice = EvaluationData(data, limit=limit), VariantChoice(["mean", "posterior"])
                record = run(target, files, choice, Sampling(), loading, progress).record
                facts["data"] = [verdict.dump() for verdict in record.verdicts]
                names = file_names([verdict.data for verdict in record.verdicts])
                for verdict in record.verdicts:
                    cure = "; a larger τ narrows them" if verdict.verdict == "worse" else ""
                    text = f"{names[verdict.data]}: {verdict.text}{cure}"
                    facts["findings"].append({"about": "draws", "good": verdict.verdict == "better", "text": text})
    if terminal.as_json:
        emit(facts)
        return
    from axolotl_ivon.errors import printable

    figures = {name: value for name, value in facts.items() if name not in ("findings", "unknown", "data")}
    # By `auto` α is a hundred times the `learning_rate` of the YAML.
    figures = {"learning_rate (α)" if name == "learning_rate" else name: value for name, value in figures.items()}
    for name, value in figures.items():
        figures[name] = "unknown" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    print_facts(figures)
    # ✓ where nothing need be done, ! where something may.
    for finding in facts["findings"]:
        click.echo(printable(f"{'✓' if finding['good'] else '!'} {finding['text']}"))
    for why in facts.get("unknown", ()):
        click.echo(printable(f"? {why}"))
