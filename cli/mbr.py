"""`ivon-post mbr`: choose one of many outputs by minimum Bayes risk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._options import Output, choice_option, output_options
from ._tables import decimal, percent, print_table

if TYPE_CHECKING:
    from axolotl_ivon.generation.mbr import Decoded


@click.command("mbr")
@click.argument("files", metavar="[LABEL=]FILE...", nargs=-1, required=True)
@choice_option(
    "--utility",
    ["exact", "bleu", "chrf", "rouge", "bertscore"],
    "How good an output is if another is right. exact: equal answers, a majority vote.",
)
@click.option(
    "--answer-regex",
    "-a",
    metavar="REGEX",
    help="The answer in a text: gsm8k (#### 7), boxed (\\boxed{7}), choice (a capital letter alone), or a regular "
    "expression, whose first group it is; the last match counts.  [default: the whole text]",
)
@choice_option(
    "--level",
    ["sequence", "model"],
    "sequence: all outputs in one pool. model: the average of the members' expectations.",
)
@output_options("FILE-mbr", "Where the choices and the figure go.", overwrite="Replace what is there.")
def command(files: tuple[str, ...], utility: str, answer_regex: str | None, level: str, output: Output) -> None:
    """Choose one output per prompt from the FILEs that `ivon-post generate` writes, by minimum Bayes risk.

    The output that the others agree with most is chosen (Daheim et al., ICLR 2025), in a tie the more probable one.
    With references, prints the accuracy by the number of outputs, and how well disagreement among the members tells
    errors (AUROC). Writes the choices as LABEL.jsonl, and accuracy.png and .svg with a curve per FILE.

    \b
      ivon-post mbr mean.jsonl posterior.jsonl "10 % pruned=pruned.jsonl" --answer-regex gsm8k
    """
    with output.progress() as progress:
        from axolotl_ivon.generation.mbr import check_output, labels, mbr
        from axolotl_ivon.generation.nbest import read_nbest
        from axolotl_ivon.generation.utilities import UTILITIES, Answers

        paths = labels(files)
        first = Path(next(iter(paths.values())))
        folder = Path(output.output) if output.output else first.with_name(f"{first.stem}-mbr")
        check_output(folder, output.overwrite)
        answers = Answers(answer_regex)
        measure = UTILITIES[utility](answers)
        lists = {label: read_nbest(path) for label, path in paths.items()}
        unmatched = {}
        for label, nbests in lists.items():
            missing, total, example = answers.unmatched(nbests)
            unmatched[label] = missing
            if missing:
                progress.notify(f"{label}: no answer in {missing} of {total} outputs, {example} for one")
        advance = progress.begin("choosing", sum(map(len, lists.values())))
        results = {label: mbr(nbests, measure, answers, level, advance) for label, nbests in lists.items()}
        progress.begin("writing")
        from axolotl_ivon.generation.report import save

        written = [str(path) for path in save(results, folder)]
    if not output.as_json:
        _print(results, utility)
    documents = [
        {"label": label, "file": paths[label], "unmatched": unmatched[label], **result.document()}
        for label, result in results.items()
    ]
    settings = {"utility": utility, "answer_regex": answer_regex, "level": level}
    document = {"accuracy": documents[0]["accuracy"], **settings, "results": documents, "files": written}
    output.finish(document, *written, then=["head", "-n", 1, written[0]])


def _print(results: dict[str, Decoded], utility: str) -> None:
    """Print a row for each file: accuracy of one output, of the choice among n, and the AUROC of disagreement."""
    numbers = sorted({point.n for result in results.values() for point in result.curve})
    if not numbers:
        for label, result in results.items():
            click.echo(f"{label}: {len(result.choices)} prompts, no references and so no accuracy")
        return
    lines = []
    for label, result in results.items():
        by_n = {point.n: point for point in result.curve}
        line = [f"{label} ({len(result.choices)})", percent(result.single)]
        line += [percent(by_n[n].accuracy, by_n[n].se) if n in by_n else "" for n in numbers]
        if utility != "exact":
            line.append(decimal(result.curve[-1].utility) if result.curve else "")
        lines.append([*line, decimal(result.auroc)])
    click.echo("accuracy (%) of one output and of the choice among n; AUROC of disagreement, for a wrong choice")
    heads = ["", "one", *(f"n = {n}" for n in numbers), *([] if utility == "exact" else [utility]), "AUROC"]
    print_table(heads, lines)
