"""`ivon-post diff`: how far apart two posteriors are."""

from __future__ import annotations

from typing import Any

import click

from . import _options as options
from ._tables import emit, number, print_table


@click.command("diff", cls=options.Sectioned)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.terminal_options
def command(first: str, second: str, terminal: options.Terminal) -> None:
    """Compare two posteriors, module by module.

    \b
    KL(A‖B), KL(B‖A)  in nats, summed over the weights with σ > 0 in both
    cosine            of the means
    apart             share of weights whose means differ by more than √(σ_A² + σ_B²)
    one-sided         share of weights with σ > 0 in one only, as after pruning; KL leaves them out
    """
    from axolotl_ivon.inspect.diff import distance
    from axolotl_ivon.posterior.combine import same_data
    from axolotl_ivon.posterior.posterior import Posterior

    with terminal.progress() as progress:
        a, b = (Posterior.from_pretrained(adapter, progress) for adapter in (first, second))
        facts = distance(a, b, progress)
    if terminal.as_json:
        emit({"a": first, "b": second, **facts})
        return
    print_table(
        ["module", "weights", "KL(A‖B)", "KL(B‖A)", "cosine", "apart", "one-sided"],
        [*map(_row, facts["modules"]), _row({**facts, "module": "all"})],
    )
    if a.tau / a.training_tau == b.tau / b.training_tau and not same_data(a, b):
        terminal.suggest("ivon-post", "combine", first, second)


def _row(facts: dict[str, Any]) -> list[str]:
    cosine = "–" if facts["cosine"] is None else f"{facts['cosine']:.4f}"
    shares = [f"{facts[name]:.1%}" for name in ("apart", "one_sided")]
    return [facts["module"], f"{facts['weights']:,}", number(facts["kl_ab"]), number(facts["kl_ba"]), cosine, *shares]
