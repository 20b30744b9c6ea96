"""`ivon-post predict`: a label for each text, how probable it is, and whether to abstain."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from . import _options as options
from ._stdout import results
from ._tables import answered


@click.command("predict", cls=options.Sectioned)
@options.adapter_argument
@click.option(
    "--data",
    "-d",
    metavar="FILE",
    help='JSONL of chats, or of {"text": …}; an answer is ignored.  [default: stdin, a text a line]',
)
@click.option(
    "--choices",
    metavar="A,B,…",
    callback=options.split_choices,
    help="Labels to choose from, with commas between.  [default: the answers of the training data]",
)
@options.by_length_option
@click.option(
    "--threshold", type=float, help="Confidence below which to abstain.  [default: that of the recommendation]"
)
@click.option(
    "--set",
    "coverage",
    type=float,
    metavar="COVERAGE",
    help="Also write the set of labels that holds the right one this often: 0.9 after `sweep --coverage 0.9`.",
)
@options.limit_option
@click.option(
    "--samples",
    "-n",
    type=click.IntRange(min=1),
    help="Number of draws to average, also where the mean is recommended.  [default: 10]",
)
@options.seed_option("Seed of the draws, the same as for `sample --seed`.")
@options.point_options()
@options.server_options
@options.model_options
@options.chat_template_option
@options.choice_option("--format", ["jsonl", "csv"], "Form of the lines.")
@options.output_options(
    None,
    "Where to write, or to continue.  [default: stdout]",
    "Start again instead of continuing.",
    metavar="FILE",
)
def command(
    adapter: str,
    data: str | None,
    choices: list[str] | None,
    by_length: bool,
    threshold: float | None,
    coverage: float | None,
    limit: int | None,
    samples: int | None,
    seed: int,
    posterior_options: options.PosteriorOptions,
    loading: options.Loading,
    format: str,
    output: options.OutputOptions,
    servers: options.Servers,
) -> None:
    """Give each text the probability of every label.

    ADAPTER is a classifier: a model that answers with one of a few labels, or one with a classification head. Writes
    a line for each text:

    \b
      {"line": 1, "text": …, "label": "refund", "confidence": 0.94, "abstain": false, "expected_entropy": …,
       "mutual_information": …, "probabilities": {"refund": 0.94, "delivery": 0.05, …}}

    The probabilities are those of whole labels, averaged over draws; confidence is the largest. Below the threshold a
    line says "abstain": true. Entropies are in nats: expected is what each draw leaves open, mutual information how far
    the draws disagree. Start the same command again to continue an interrupted one.

    \b
      ivon-post predict adapter/ --data texts.jsonl --choices refund,delivery,other -o decisions.jsonl
      echo 'where is my parcel' | ivon-post predict adapter/ --threshold 0.8
      ivon-post predict adapter/ --data texts.jsonl --format csv > decisions.csv
      ivon-post predict ensemble/ --data texts.jsonl --endpoint http://localhost:8000
    """
    from axolotl_ivon.data.chats import read_questions, read_texts
    from axolotl_ivon.decisions.decide import Decider
    from axolotl_ivon.decisions.decision_file import DecisionFile, DecisionLines
    from axolotl_ivon.errors import IVONError
    from axolotl_ivon.evaluation.evaluate import Sampling
    from axolotl_ivon.reporter import Stage
    from axolotl_ivon.storage.atomic import check_file

    stdin = data in (None, "-")
    if stdin and sys.stdin.isatty():
        raise IVONError("there are no texts; give --data FILE, or pipe them in")
    path = output.given_path(adapter, data=None if stdin else data)
    if path:
        check_file(path, overwrite=True)  # a run of the same settings is taken up; of others `DecisionFile` refuses
    if stdin:
        total, examples = 0, read_texts(sys.stdin.buffer, limit)
    else:
        rows = list(read_questions(str(data), limit))
        total, examples = len(rows), iter(rows)
    served = servers.model(adapter, loading)
    setting = posterior_options.settings(adapter, output, "draws" if samples else "", served=bool(served))
    rule = replace(setting.rule, by_length=by_length or setting.rule.by_length)
    if threshold is not None:
        rule = replace(rule, threshold=threshold, score="probability")
    if coverage is not None and (rule.prediction_set is None or rule.prediction_set.coverage != coverage):
        fix = f"run `ivon-post sweep --coverage {coverage:g}`, and give its file with --recommended"
        if samples and setting.recommended:
            fix = f"leave --samples out, as sets are of what is recommended; or {fix}"
        raise IVONError(f"--set {coverage:g}: there are no sets of that coverage; {fix}")
    if coverage is None:
        rule = replace(rule, prediction_set=None)
    asked = (
        served is not None
        or samples is not None
        or setting.recommended is not None
        or posterior_options.tau is not None
    )
    with output.progress() as progress:
        decider = Decider(
            adapter,
            choices,
            rule,
            served.sampling if served else Sampling(samples or 10, seed),
            tau=setting.tau if asked else None,
            ratio=setting.ratio,
            loading=loading,
            reporter=progress,
            served=served,
        )
        lines = DecisionLines(format, decider.choices)
        folders = filter(Path.is_dir, [Path(adapter)])
        file = DecisionFile(path, lines, decider.settings, output.overwrite, folders) if path else None
        resumed = file.resume(examples) if file else 0
        shown: list[dict[str, Any]] = []
        counts, abstained = Counter[str](), 0
        if not (file or output.as_json):
            for head in lines.head:
                click.echo(head, file=results())
        stage = Stage(progress, "deciding", max(0, total - resumed) * decider.passes)
        with closing(file) if file else nullcontext():
            for window in decider.windows(examples, stage):
                counts.update(decision.label for _, decision in window)
                abstained += sum(decision.abstain is True for _, decision in window)
                if file:
                    file.append(window)
                    continue
                for example, decision in window:
                    if output.as_json:
                        shown.append({"line": example.line, "text": example.question, **decision.dump()})
                    else:
                        click.echo(lines.line(example, decision), file=results())
                results().flush()
            if file:
                file.append([])

    def share_answered() -> float | None:
        return None if rule.threshold is None or not counts else 1 - abstained / counts.total()

    document: dict[str, Any] = {"output": output.output, "texts": counts.total(), "resumed": resumed}
    document |= {**decider.settings, "labels": dict(counts), "coverage": share_answered()}
    if output.as_json:
        output.finish(document if file else {**document, "decisions": shown})
        return
    if file:  # the line is about all that it holds
        counts, abstained = counts + file.labels, abstained + file.abstained
    count = counts.total()
    texts = ", ".join(f"{label} {n}" for label, n in counts.most_common(8))
    line = (
        f"{count} text{'' if count == 1 else 's'}"
        + (f" ({resumed} were there)" if resumed else "")
        + (f": {texts}" if texts else "")
    )
    line += answered(share_answered(), rule.threshold)
    if file:
        output.finish(document, line, path)
    elif not output.quiet:
        click.echo(line, err=True)
