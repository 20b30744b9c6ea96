"""`ivon-post serve`: an OpenAI-compatible server that says how sure its answers are."""

from __future__ import annotations

from typing import Any

import click

from ._options import (
    Point,
    Terminal,
    adapter_argument,
    as_one,
    decision,
    model_options,
    point_options,
    seed_option,
    terminal_options,
)


@click.command("serve")
@adapter_argument
@click.option("--samples", "-n", type=click.IntRange(1, 9999), default=8, show_default=True, help="Draws to average.")
@seed_option("Seed of the draws: those of `sample --seed`.")
@point_options(
    "Temperature of the posterior: σ/√τ, see `temper`.  [default: 1]",
    "Prune this share by |m|/σ first.  [default: 0]",
)
@click.option("--name", help="What the average is called.  [default: the name of ADAPTER]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key",
    envvar="IVON_API_KEY",
    metavar="KEY",
    help="What clients must send.  [default: $IVON_API_KEY, which others on this machine do not see]",
)
@click.option("--max-queue", type=click.IntRange(0), default=32, show_default=True, help="Requests that may wait.")
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Most of one answer.")
@click.option("--max-body", type=click.IntRange(1), default=1_000_000, show_default=True, help="Bytes of a request.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Of one request, waiting included, in seconds.",
)
@model_options
@terminal_options
@as_one("address", dict, "host", "port", "api_key")
@as_one("limits", dict, "max_queue", "max_tokens", "timeout")
def command(
    adapter: str,
    samples: int,
    seed: int,
    point: Point,
    name: str | None,
    address: dict[str, Any],
    limits: dict[str, Any],
    max_body: int,
    terminal: Terminal,
    **options: Any,
) -> None:
    """Serve ADAPTER under OpenAI's interface: answers are the average of draws, and say how sure they are.

    The model NAME chooses every token from the average of the members' probabilities; NAME:mean is the mean alone,
    NAME:member-0000 the first draw. Every answer has a field `ivon`: confidence, expected_entropy and
    mutual_information; with logprobs also of every token. A page to try it is at /.

    \b
      ivon-post serve adapter/ --recommended adapter-sweep/recommended.json
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "adapter", "messages": [{"role": "user", "content": "Is a whale a fish?"}]}'
    """
    from axolotl_ivon.serving.serve import Address, check_packages, local_backend

    check_packages()
    from axolotl_ivon.serving.backend import Limits
    from axolotl_ivon.serving.http import bind

    place = Address(**address)
    tau, ratio = point.settings(adapter)
    decided = decision(point.recommended)
    with terminal.progress() as progress, bind(place.host, place.port) as bound:
        backend = local_backend(
            adapter,
            Limits(**limits),
            name=name,
            samples=samples,
            seed=seed,
            tau=tau,
            prune_ratio=ratio,
            temperature=decided.temperature,
            threshold=decided.threshold,
            begin=progress.begin,
            **options,
        )
        if decided.threshold is not None and decided.score != "probability":
            progress.notify("the threshold is of outputs that agree; of a token's probability it promises nothing")
        from axolotl_ivon.serving.app import Guard, make_app
        from axolotl_ivon.serving.http import run

        guard = Guard(place.api_key, max_body, timeout=limits["timeout"] + 60)
        port = bound.getsockname()[1]
        url = f"http://{f'[{place.host}]' if ':' in place.host else place.host}:{port}"
        document = {"url": url, "models": list(backend.models)}

        def ready() -> None:
            terminal.finish(document, *(f"{word}  {value}" for word, value in told.items()))

        told = {"url": url, "model": next(iter(backend.models)), "page": f"{url}/"}
        run(make_app(backend, guard), bound, ready)
