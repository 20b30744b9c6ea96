"""`ivon-post generate`: n-best lists from draws of the posterior."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from ._common import adapter_argument, emit, json_option, quiet_option, recommended_option, seed_option, settings
from ._evaluation import BatchSize, Reporter

if TYPE_CHECKING:
    from axolotl_ivon.data.encode import Prompt
    from axolotl_ivon.generation.plan import Engine, Plan


class _Meter(Reporter):
    """A reporter that shows tokens per second, which `count` is told, beside the prompts done."""

    _tokens = 0

    def count(self, tokens: int) -> None:
        """Note that so many tokens were generated."""
        self._tokens += tokens
        self._text = f"generating, {self._tokens / (time.monotonic() - self._started):.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, description=self._text)

    def finish(self) -> dict[str, Any]:
        """Print what it took, and return it."""
        seconds = time.monotonic() - self._started
        speed = self._tokens / seconds if seconds else 0.0
        self._console.print(
            f"{self._tokens} tokens in {seconds:.1f} s: {speed:.0f} tokens/s", highlight=False, soft_wrap=True
        )
        return {"tokens": self._tokens, "seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)}


@click.command("generate")
@adapter_argument
@click.option("--prompts", "-p", required=True, metavar="FILE", help="Chat JSONL; a last answer is the reference.")
@click.option("-n", "n", type=int, default=32, show_default=True, help="Outputs for each prompt.")
@click.option("--per-model", type=int, default=8, show_default=True, help="Outputs of each draw; n/PER-MODEL draws.")
@click.option("--mean", is_flag=True, help="All n from the mean, not from draws.")
@click.option("--tau", type=float, help="Temperature of the posterior: σ/√τ, see `temper`.  [default: 1]")
@click.option("--prune-ratio", "--ratio", type=float, help="Prune this share by |m|/σ first.  [default: 0]")
@recommended_option("τ and the ratio")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the tokens; 0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest tokens only.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Of one output.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an output before TEXT; may be given several times.")
@seed_option("Seed of the draws, those of `sample --seed`, and of the outputs.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT prompts.")
@click.option("--endpoint", metavar="URL", help="Ask an OpenAI-compatible server; ADAPTER is the ensemble it serves.")
@click.option("--concurrency", type=click.IntRange(min=1), default=32, show_default=True, help="Requests at a time.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Of one request, in seconds.",
)
@click.option("--base-model", metavar="MODEL", help="Folder or Hub id.  [default: what the adapter's config names]")
@click.option("--load-in", type=click.Choice(["8bit", "4bit"]), help="Quantize the base model (bitsandbytes).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, …")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the base model. auto: float32 on a CPU, the checkpoint's elsewhere.",
)
@click.option("--batch-size", type=BatchSize(), default="auto", show_default=True, help="Sequences decoded at once.")
@click.option("--output", "-o", metavar="FILE", help="JSONL to write or to go on with.  [default: ADAPTER-nbest.jsonl]")
@click.option("--overwrite", is_flag=True, help="Start the output anew.")
@json_option
@quiet_option
def command(
    adapter: str,
    prompts: str,
    tau: float | None,
    prune_ratio: float | None,
    recommended: str | None,
    limit: int | None,
    endpoint: str | None,
    concurrency: int,
    timeout: float,
    base_model: str | None,
    batch_size: int | None,
    output: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    load_in: str | None,
    device: str,
    dtype: str,
    **planned: Any,
) -> None:
    """Generate n outputs for every prompt: n/PER-MODEL draws from ADAPTER's posterior, PER-MODEL outputs each.

    Writes JSONL, a line per prompt, for `ivon-post mbr`:

    \b
      {"prompt": …, "reference": …, "outputs": [{"text": …, "member": 0, "logprob": …}, …]}

    member is the number of the draw (0 for the mean), logprob the sum of the tokens' log-probabilities under that
    member before --temperature and --top-p. The same command goes on where an interrupted one stopped.

    \b
      ivon-post generate adapter/ -p test.jsonl -n 64 --prune-ratio 0.1 -o pruned.jsonl
      ivon-post generate adapter/ -p test.jsonl -n 64 --mean -o mean.jsonl
      ivon-post generate ensemble/ -p test.jsonl -n 64 --endpoint http://localhost:8000
    """
    path = output or f"{adapter.rstrip('/')}-nbest.jsonl"
    reporter = _Meter(quiet)
    with reporter:
        reporter.stage("reading the adapter and the prompts")
        from axolotl_ivon.data.chats import read_chats
        from axolotl_ivon.data.encode import render
        from axolotl_ivon.errors import IVONError
        from axolotl_ivon.generation.nbest import NBestFile
        from axolotl_ivon.generation.plan import Plan
        from axolotl_ivon.models.load import load_tokenizer

        plan = Plan(**planned)
        if plan.mean and tau is not None:
            raise IVONError(f"--tau {tau}: --mean has no temperature; leave one of them out")
        chats = read_chats(prompts, limit)
        facts: dict[str, Any]
        if endpoint:
            if tau is not None or prune_ratio is not None or recommended:
                raise IVONError(
                    "--endpoint: the members are drawn already; give --tau and --prune-ratio to `ivon-post sample`"
                )
            from axolotl_ivon.generation.endpoint import EndpointEngine
            from axolotl_ivon.generation.serve import Ensemble

            ensemble = Ensemble(adapter)
            rendered = render(load_tokenizer(ensemble.tokenizer_folder, base_model or ensemble.base_model), chats)
            facts = {"engine": "endpoint", "ensemble": ensemble.facts}
        else:
            from axolotl_ivon.posterior.adapter import mean_sha256

            temperature, ratio = settings(recommended, tau=tau, ratio=prune_ratio)
            posterior, base = _open(adapter, plan, temperature, ratio, base_model)
            tokenizer = load_tokenizer(posterior.folder, base)
            rendered = render(tokenizer, chats)
            facts = {
                "engine": "transformers",
                "adapter": posterior.metadata.get("mean_sha256") or mean_sha256(posterior.mean),
                "base_model": base,
                "load_in": load_in,
                "dtype": dtype,
                "tau": "inf" if plan.mean or math.isinf(posterior.tau) else posterior.tau,
                "prune_ratio": ratio,
            }
        file = NBestFile(path, {**facts, **planned}, rendered, overwrite)
        before = file.done
        took: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0}
        if before < len(rendered):
            engine: Engine
            if endpoint:
                reporter.stage("asking the server for its models")
                engine = EndpointEngine(
                    endpoint, ensemble.members(plan), plan, concurrency=concurrency, timeout=timeout
                )
            else:
                reporter.stage("loading the base model")
                from axolotl_ivon.generation.local import TransformersEngine
                from axolotl_ivon.models.load import load_model

                model = load_model(posterior.folder, base_model=base, load_in=load_in, device=device, dtype=dtype)
                engine = TransformersEngine(
                    model, tokenizer, posterior, plan, batch_size=batch_size, notify=reporter.notify
                )
            took = _run(engine, rendered, file, reporter)
    if as_json:
        emit({"output": path, "prompts": len(rendered), "resumed": before, "members": plan.members, **planned, **took})
        return
    source = "the mean" if plan.mean else f"{plan.members} draws"
    kept = f" ({before} were there)" if before else ""
    click.echo(f"{len(rendered)} prompts{kept}, {plan.n} outputs each from {source}, seed {plan.seed}")
    click.echo(path)


def _open(adapter: str, plan: Plan, tau: float, ratio: float, base_model: str | None) -> tuple[Any, str]:
    """Return the posterior, pruned and tempered, and the name of its base model."""
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.evaluation.evaluate import Row, open_posterior
    from axolotl_ivon.posterior.posterior import Posterior

    if plan.mean and not ratio:
        posterior = open_posterior(adapter, [Row("mean")])
    else:
        posterior = Posterior.from_pretrained(adapter)
        if ratio:
            posterior = posterior.prune(ratio)
        posterior = posterior.temper(tau)
    base = base_model or posterior.config.get("base_model_name_or_path")
    if not base:
        raise IVONError(f"{adapter}: adapter_config.json names no base model; name it with --base-model")
    return posterior, str(base)


def _run(engine: Engine, prompts: Sequence[Prompt], file: Any, meter: _Meter) -> dict[str, Any]:
    """Generate what the file lacks, and return how much that was and how long it took."""
    todo = prompts[file.done :]
    advance = meter.begin("generating", len(todo))
    with closing(file):
        for prompt, outputs in zip(todo, engine.outputs(prompts, file.done, meter.count), strict=True):
            file.append(prompt, outputs)
            advance(1)
    return meter.finish()
