"""`ivon-post generate`: n-best lists from draws of the posterior."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from . import _options as options
from ._tables import answered


@click.command("generate", cls=options.Sectioned)
@options.adapter_argument
@click.option(
    "--prompts",
    "-p",
    required=True,
    metavar="FILE",
    help="Chat JSONL. If a conversation ends with an answer, that is the reference.",
)
@options.option("-n", "n", type=int, default=32, help="Number of outputs for each prompt.")
@click.option("--per-model", type=int, help="Number of outputs from each draw.  [default: 8]")
@click.option(
    "--mean",
    is_flag=True,
    help="Generate all outputs from the mean, not from draws.  "
    "[default: on if recommended.json recommends the mean and --per-model is not given]",
)
@options.point_options()
@options.option("--temperature", type=float, default=1.0, help="Temperature of the tokens; 0 is greedy.")
@options.option(
    "--top-p", type=float, default=1.0, help="Sample only the likeliest tokens, whose probabilities add up to this."
)
@options.option("--max-tokens", type=int, default=256, help="Maximum tokens per output.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an output before TEXT. Repeatable.")
@options.answer_option
@options.seed_option("Seed of the draws, as for `sample --seed`, and of the outputs.")
@options.limit_option
@click.option(
    "--endpoint",
    metavar="URL",
    help="URL of an OpenAI-compatible server that serves the members of the ensemble ADAPTER.",
)
@options.model_options
@options.chat_template_option
@options.output_options(
    "ADAPTER-nbest.jsonl", "JSONL to write, or to continue.", "Start again instead of continuing.", metavar="FILE"
)
@options.as_one("planned", dict, "n", "per_model", "mean", "temperature", "top_p", "max_tokens", "stop", "seed")
def command(
    adapter: str,
    prompts: str,
    planned: dict[str, Any],
    posterior_options: options.PosteriorOptions,
    answer_regex: str | None,
    limit: int | None,
    endpoint: str | None,
    loading: options.Loading,
    output: options.OutputOptions,
) -> None:
    """Generate many outputs per prompt, from draws.

    Takes n/PER-MODEL draws from ADAPTER's posterior, with PER-MODEL outputs each. If ADAPTER's recommended.json
    recommends the mean, all outputs are from the mean. Writes JSONL for `ivon-post mbr`, one line per prompt:

    \b
      {"prompt": …, "reference": …, "confidence": …, "semantic_entropy": …, "expected_entropy": …,
       "mutual_information": …, "outputs": [{"text": …, "member": 0, "logprob": …}, …]}

    confidence is the share of outputs with the most frequent answer. If the recommendation has a threshold, lines below
    it have "abstain": true. The entropies are those of the answers: semantic (of all outputs) = expected (within a
    draw) + mutual information (between draws).

    member is the number of the draw (0 for the mean), logprob the sum of the tokens' log-probabilities under that
    member before --temperature and --top-p. Start the same command again to continue an interrupted one.

    \b
      ivon-post generate adapter/ -p test.jsonl -n 64 --ratio 0.1 -o pruned.jsonl
      ivon-post generate adapter/ -p test.jsonl -n 64 --mean -o mean.jsonl
      ivon-post generate ensemble/ -p test.jsonl -n 64 --endpoint http://localhost:8000
    """
    from axolotl_ivon.data.chats import read_chats
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.generation.generate import AnswerRule, generate, loaded_draws, served_draws, speed_text
    from axolotl_ivon.generation.plan import Plan
    from axolotl_ivon.generation.utilities import AnswerExtractor

    path = str(output.path(adapter, "nbest.jsonl", prompts=prompts))
    per_model, mean = planned.pop("per_model"), planned.pop("mean")
    if mean and posterior_options.tau is not None:
        raise IVONError(f"--tau {posterior_options.tau}: --mean has no temperature; leave one of them out")
    if endpoint:
        options.refuse_drawn("tau", "ratio", *(["recommended"] if posterior_options.file else []))
        posterior_options = options.PosteriorOptions(False)
    wants = "mean" if mean else "" if per_model is None else "draws"
    tau, ratio, decided, _, is_mean = posterior_options.settings(adapter, output, wants)
    plan = Plan(**planned, per_model=8 if per_model is None else per_model, mean=mean or is_mean)
    rule = AnswerRule(AnswerExtractor(answer_regex), decided.threshold, decided.temperature)
    with output.progress() as progress:
        if decided.threshold is not None and decided.score != "agreement":
            progress.notify(options.OTHER_CONFIDENCE)
        chats = read_chats(prompts, limit)
        if endpoint:
            source = served_draws(adapter, plan, endpoint, loading.base_model, loading.chat_template_kwargs)
        else:
            source = loaded_draws(adapter, plan, tau, ratio, loading)
        done = generate(source, chats, path, rule, overwrite=output.overwrite, reporter=progress)
        speed = done.tokens_per_second
        if done.resumed < done.prompts:
            progress.say(f"{done.tokens} tokens in {done.seconds:.1f} s: {speed_text(speed)}")
    coverage = None if rule.threshold is None else 1 - done.abstained / done.prompts
    document = {"output": path, "prompts": done.prompts, "resumed": done.resumed, "members": plan.members}
    document |= {**asdict(plan), "tokens": done.tokens, "seconds": round(done.seconds, 3)}
    document |= {"tokens_per_second": round(speed, 1), "coverage": coverage}
    resumed = f" ({done.resumed} were there)" if done.resumed else ""
    members = "the mean" if plan.mean else f"{plan.members} draw{'s' if plan.members > 1 else ''}"
    line = f"{done.prompts} prompts{resumed}, {plan.n} outputs each from {members}, seed {plan.seed}"
    line += answered(coverage, rule.threshold)
    output.finish(document, line, path, then=["ivon-post", "mbr", path])
