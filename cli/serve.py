"""`ivon-post serve`: an OpenAI-compatible server that says how sure its answers are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from . import _options as options

if TYPE_CHECKING:
    from axolotl_ivon.decisions.rule import DecisionRule

_SECTIONS = {
    "Server": {"host", "port", "name", "max_tokens"},
    "In front of vLLM": {"endpoints", "combine", "answer_regex"},
}


@click.command("serve", cls=options.Sectioned, sections=_SECTIONS)
@options.adapter_argument
@options.option(
    "--host", default="127.0.0.1", help="Address to listen on; any but 127.0.0.1, ::1 and localhost needs a key."
)
@options.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port; 0: any free one.")
@click.option("--name", help="Name under which the adapter is served.  [default: the name of ADAPTER]")
@options.option("--max-tokens", type=click.IntRange(1), default=2048, help="Maximum tokens per answer.")
@click.option("--max-queue", type=click.IntRange(0), hidden=True)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, hidden=True)
@click.option(
    "--samples",
    "-n",
    type=click.IntRange(1, 9999),
    help="Number of draws to average, also where the mean is recommended.  [default: 8, or all served]",
)
@options.seed_option("Seed of the draws, as for `sample --seed`.")
@options.point_options()
@options.model_options
@options.chat_template_option
@options.endpoints_option
@options.choice_option(
    "--combine",
    ["exact", "bleu", "chrf", "rouge", "bertscore", "rescore"],
    "With --endpoint, which of the members' answers to give: the one that the others agree with most, by this utility "
    "of `mbr`, or the one with the largest average probability (rescore).",
)
@options.answer_option
@click.option("--candidates", type=click.IntRange(1, 64), default=4, hidden=True)
@click.option("--concurrency", type=click.IntRange(1), default=256, hidden=True)
@options.terminal_options
@options.as_one("server", dict, "host", "port", "name", "max_tokens", "max_queue", "timeout")
@options.as_one("draws", dict, "samples", "seed")
@options.as_one("proxied", dict, "endpoints", "combine", "answer_regex", "candidates", "concurrency")
def command(
    adapter: str,
    server: dict[str, Any],
    draws: dict[str, Any],
    posterior_options: options.PosteriorOptions,
    loading: options.Loading,
    proxied: dict[str, Any],
    terminal: options.Terminal,
) -> None:
    """Serve an adapter through an OpenAI-compatible API.

    Answers have a confidence. The model NAME is the average of the draws, or the mean (one pass) where recommended.json
    says so, at its softmax temperature. NAME:posterior is the draws, NAME:mean the mean, NAME:member-0000 the first
    draw. Every answer has a field `ivon`: confidence, expected_entropy and mutual_information; with logprobs also of
    every token. Open / in a browser to try it. If the environment variable IVON_API_KEY is set, clients must send it as
    their key.

    \b
      ivon-post serve adapter/ --recommended adapter-sweep/recommended.json
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "adapter", "messages": [{"role": "user", "content": "Is a whale a fish?"}]}'
      ivon-post serve ensemble/ --endpoint http://10.0.0.5:8000 --endpoint http://10.0.0.6:8000 --port 9000
    """
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.serving.start import KEY_VARIABLE, check_key, check_packages

    check_packages()
    from axolotl_ivon.serving.api.backend import Limits
    from axolotl_ivon.serving.api.http import bind, run

    host, api_key = server["host"], os.environ.get(KEY_VARIABLE)
    check_key(host, api_key)
    endpoints, wanted = proxied.pop("endpoints"), "draws" if draws["samples"] else ""
    max_queue = (256 if endpoints else 32) if server["max_queue"] is None else server["max_queue"]
    limits = Limits(max_queue, server["max_tokens"], server["timeout"])

    with bind(host, server["port"]) as bound:
        with terminal.progress() as progress:
            if endpoints:
                from axolotl_ivon.serving.proxy.proxy import Combining
                from axolotl_ivon.serving.start import proxy_backend

                options.refuse_drawn("seed", "tau", "ratio")
                if loading.chat_template_kwargs is not None:
                    raise IVONError(
                        "--endpoint: the servers render chats; send chat_template_kwargs with each request, or start "
                        "vLLM with --default-chat-template-kwargs in place of --chat-template-kwargs"
                    )
                _, rule, mean_rule = _answering(posterior_options.settings(adapter, terminal, wanted, served=True))
                names = {"name": server["name"], "samples": draws["samples"], "mean_rule": mean_rule}
                backend = proxy_backend(adapter, endpoints, rule, limits, Combining(**proxied), **names)
            else:
                from axolotl_ivon.serving.start import Drawing, local_backend

                setting = posterior_options.settings(adapter, terminal, wanted)
                tau, rule, mean_rule = _answering(setting)
                drawing = Drawing(adapter, draws["samples"] or 8, draws["seed"], tau, setting.ratio)
                names = {"name": server["name"], "mean_rule": mean_rule}
                backend = local_backend(drawing, rule, limits, loading, **names, reporter=progress)
            decided = mean_rule or rule
            of_texts = endpoints and proxied["combine"] != "rescore" and mean_rule is None
            score = "agreement" if of_texts else "probability"
            if decided.threshold is not None and decided.score != score:
                line = "the threshold was found for the agreement of outputs, so it promises nothing here"
                if decided.score == "probability":
                    line = "the threshold was found for label probabilities, so it promises nothing for free answers"
                progress.notify(line)
            if endpoints and mean_rule and mean_rule.threshold is not None and mean_rule.temperature != 1:
                progress.notify(
                    f"the threshold was found at T {mean_rule.temperature:.3g}; the servers write texts at T 1, where "
                    "it promises nothing"
                )
        from axolotl_ivon.serving.api.app import Guard, make_app

        url, models = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}", list(backend.models)

        def ready() -> None:
            lines = {"url": url, "model": models[0], "page": f"{url}/"}
            terminal.finish({"url": url, "models": models}, *(f"{word:<6} {value}" for word, value in lines.items()))

        run(make_app(backend, Guard(api_key, timeout=limits.timeout + 60)), bound, ready)


def _answering(setting: options.Setting) -> tuple[float, DecisionRule, DecisionRule | None]:
    """Return the draws' temperature τ, what is made of them, and of the mean where that answers."""
    if not (setting.recommended and setting.is_mean):
        return setting.tau, setting.rule, None
    drawn = setting.recommended.for_draws()
    return drawn.tau, drawn.rule, setting.rule
