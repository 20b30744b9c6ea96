"""`ivon-post serve`: an OpenAI-compatible server that says how sure its answers are."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    PosteriorOptions,
    Terminal,
    adapter_argument,
    answer_option,
    as_one,
    choice_option,
    decision,
    model_options,
    point_options,
    terminal_options,
)

if TYPE_CHECKING:
    from axolotl_ivon.models.session import Loading


@click.command("serve")
@adapter_argument
@click.option(
    "--samples",
    "-n",
    type=click.IntRange(1, 9999),
    help="Draws to average.  [default: 8; with --endpoint all there are]",
)
@click.option("--seed", type=int, help="Seed of the draws: those of `sample --seed`.  [default: 0]")
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
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    help="Requests that may wait; further ones get status 429.  [default: 32; with --endpoint 256 that run]",
)
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Most of one answer.")
@click.option("--max-body", type=click.IntRange(1), default=1_000_000, show_default=True, help="Bytes of a request.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Of one request, waiting included, in seconds.",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="URL",
    help="Ask OpenAI-compatible servers that serve the members; ADAPTER is their ensemble. May be given several times.",
)
@choice_option("--combine", ["mbr", "rescore"], "With --endpoint: how one of the members' answers is chosen.")
@click.option(
    "--candidates", type=click.IntRange(1, 64), default=4, show_default=True, help="With --endpoint: of each member."
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="With --endpoint: requests at a time to each server.",
)
@choice_option("--utility", ["exact", "bleu", "chrf", "rouge", "bertscore"], "Of --combine mbr, as in `mbr`.")
@answer_option
@model_options
@terminal_options
@as_one("address", dict, "host", "port", "api_key")
@as_one("limits", dict, "max_queue", "max_tokens", "timeout")
@as_one("combining", dict, "combine", "candidates", "concurrency", "utility", "answer_regex")
def command(
    adapter: str,
    samples: int | None,
    seed: int | None,
    point: PosteriorOptions,
    name: str | None,
    address: dict[str, Any],
    limits: dict[str, Any],
    max_body: int,
    endpoints: tuple[str, ...],
    combining: dict[str, Any],
    loading: Loading,
    terminal: Terminal,
) -> None:
    """Serve ADAPTER under OpenAI's interface: answers are the average of draws, and say how sure they are.

    The model NAME chooses every token from the average of the members' probabilities; NAME:mean is the mean alone,
    NAME:member-0000 the first draw. Every answer has a field `ivon`: confidence, expected_entropy and
    mutual_information; with logprobs also of every token. A page to try it is at /.

    \b
      ivon-post serve adapter/ --recommended adapter-sweep/recommended.json
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "adapter", "messages": [{"role": "user", "content": "Is a whale a fish?"}]}'
      ivon-post serve ensemble/ --endpoint http://10.0.0.5:8000 --endpoint http://10.0.0.6:8000 --port 9000
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.serving.start import Address, check_packages, local_backend, upstream_backend

    check_packages()
    from axolotl_ivon.serving.api.http import bind
    from axolotl_ivon.serving.backend import Limits

    place = Address(**address)
    decided = decision(point.recommended)
    sure: dict[str, Any] = {"temperature": decided.temperature, "threshold": decided.threshold}
    limited = Limits(**{key: value for key, value in limits.items() if value is not None})
    with bind(place.host, place.port) as bound:
        with terminal.progress() as progress:
            if endpoints:
                if seed is not None or (point.tau, point.ratio) != (None, None):
                    raise IVONError(
                        "--endpoint: the members are drawn already; give --tau, --ratio and --seed to `sample`"
                    )
                if limits["max_queue"] is None:
                    limited = replace(limited, max_queue=256)
                backend = upstream_backend(adapter, endpoints, limited, name=name, samples=samples, **combining, **sure)
            else:
                tau, ratio = point.settings(adapter)
                backend = local_backend(
                    adapter,
                    limited,
                    name=name,
                    samples=samples or 8,
                    seed=seed or 0,
                    tau=tau,
                    prune_ratio=ratio,
                    begin=progress.begin,
                    **sure,
                    **asdict(loading),
                )
            score = "agreement" if endpoints and combining["combine"] == "mbr" else "probability"
            if decided.threshold is not None and decided.score != score:
                progress.notify(
                    f"the threshold is of another confidence ({decided.score}); of this one it promises nothing"
                )
        from axolotl_ivon.serving.api.app import Guard, make_app
        from axolotl_ivon.serving.api.http import run

        guard = Guard(place.api_key, max_body, timeout=limited.timeout + 60)
        port = bound.getsockname()[1]
        url = f"http://{f'[{place.host}]' if ':' in place.host else place.host}:{port}"
        document = {"url": url, "models": list(backend.models)}

        def ready() -> None:
            terminal.finish(document, *(f"{word:<6} {value}" for word, value in told.items()))

        told = {"url": url, "model": next(iter(backend.models)), "page": f"{url}/"}
        run(make_app(backend, guard), bound, ready)
