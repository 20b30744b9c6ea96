"""`ivon-post mbr`: choose one of many outputs by minimum Bayes risk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import OutputOptions, answer_option, choice_option, decision, output_options, risk_options
from ._progress import Progress
from ._tables import decimal, percent, print_table

if TYPE_CHECKING:
    from axolotl_ivon.decisions.abstention import Abstention
    from axolotl_ivon.decisions.sweep import Decision
    from axolotl_ivon.generation.mbr import Decoded


@click.command("mbr")
@click.argument("files", metavar="[LABEL=]FILE...", nargs=-1, required=True)
@choice_option(
    "--utility",
    ["exact", "bleu", "chrf", "rouge", "bertscore"],
    "How good an output is if another is right. exact: equal answers, a majority vote.",
)
@answer_option
@choice_option(
    "--level",
    ["sequence", "model"],
    "sequence: all outputs in one pool. model: the average of the members' expectations.",
)
@choice_option(
    "--clusters",
    ["exact", "embedding"],
    "Which outputs mean the same, for the uncertainty. exact: equal answers. embedding: answers whose embeddings are "
    "alike.",
)
@click.option("--embedding-model", metavar="DIR", help="A model that sentence-transformers saved, for --clusters.")
@click.option(
    "--similarity",
    type=click.FloatRange(-1, 1),
    default=0.8,
    show_default=True,
    help="Least cosine of what means the same, for --clusters embedding.",
)
@click.option("--fields", metavar="A,B.C", help="The confidence of these fields of JSON answers, too.")
@click.option("--recommended", metavar="FILE", help="Abstain below the threshold of a recommended.json.")
@risk_options("on half of the prompts, which need references; the other half says where to look for it")
@output_options("FILE-mbr", "Where the choices and the figure go.", overwrite="Replace what is there.")
def command(
    files: tuple[str, ...],
    utility: str,
    answer_regex: str | None,
    level: str,
    recommended: str | None,
    risk: float | None,
    confidence: float,
    fields: str | None,
    output: OutputOptions,
    **meaning: Any,
) -> None:
    """Choose one output per prompt from the FILEs that `ivon-post generate` writes, by minimum Bayes risk.

    The output that the others agree with most is chosen (Daheim et al., ICLR 2025), in a tie the more probable one.
    With references, prints the accuracy by the number of outputs, and how well disagreement among the members tells
    errors (AUROC). Writes the choices as LABEL.jsonl, and accuracy.png and .svg with a curve per FILE.

    \b
    A line of LABEL.jsonl, and a second table, say how sure the outputs are
      confidence            the share of the outputs that mean what the chosen one does
      semantic_entropy      of the meanings, = expected + mutual information
      expected_entropy      within draws: the question is open
      mutual_information    between draws: the model does not know

    \b
      ivon-post mbr mean.jsonl posterior.jsonl "10 % pruned=pruned.jsonl" --answer-regex gsm8k
      ivon-post mbr validation.jsonl -a gsm8k --risk 0.05 -o chosen
      ivon-post mbr test.jsonl -a gsm8k --recommended chosen/recommended.json
    """
    with output.progress() as progress:
        from axolotl_ivon.generation.fields import check_fields, check_outputs
        from axolotl_ivon.generation.mbr import check_output, labels, mbr
        from axolotl_ivon.generation.nbest import read_nbest, read_source
        from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor

        paths = labels(files)
        first = Path(next(iter(paths.values())))
        folder = Path(output.output) if output.output else first.with_name(f"{first.stem}-mbr")
        check_output(folder, output.overwrite)
        answers = AnswerExtractor(answer_regex)
        measure = UTILITIES[utility](answers)
        wanted = check_fields(fields) if fields is not None else ()
        sources = {label: read_source(path) for label, path in paths.items()}
        decided = _decided(recommended, risk, confidence, sources, progress)
        more: dict[str, Any] = {"clusters": _clusters(**meaning), "fields": wanted, "temperature": decided.temperature}
        lists = {label: read_nbest(path) for label, path in paths.items()}
        unmatched = {}
        for label, nbests in lists.items():
            if wanted:
                check_outputs([text for nbest in nbests for text in nbest.texts], wanted, paths[label])
            missing, total, example = answers.unmatched(nbests)
            unmatched[label] = missing
            if missing:
                progress.notify(f"{label}: no answer in {missing} of {total} outputs, {example} for one")
        advance = progress.begin("choosing", sum(map(len, lists.values())))
        results = {label: mbr(nbests, measure, answers, level, advance, **more) for label, nbests in lists.items()}
        settings = {"utility": utility, "answer_regex": answer_regex, "level": level, "clusters": meaning["clusters"]}
        promise = None
        if risk is not None:
            [(label, result)] = results.items()
            promise = _promise(result, paths[label], risk, confidence)
            decided = replace(decided, threshold=promise.threshold)
        if decided.threshold is not None:
            results = {label: result.abstaining(decided.threshold) for label, result in results.items()}
        progress.begin("writing")
        from axolotl_ivon.plots.scaling import save

        written = [str(path) for path in save(results, folder)]
        if promise is not None:
            from axolotl_ivon.decisions.sweep import write_recommended

            facts = {**(sources[label] or {}), "objective": "risk", "score": "agreement", **promise.document()}
            written.append(str(write_recommended(folder, {**facts, "data": [paths[label]], **settings})))
    if not output.as_json:
        _print(results, utility)
        _print_uncertainty(results)
    documents = [
        {"label": label, "file": paths[label], "unmatched": unmatched[label], **result.document()}
        for label, result in results.items()
    ]
    document = {"accuracy": documents[0]["accuracy"], **settings, "results": documents, "files": written}
    if promise is not None:
        document |= promise.document()
    promised = [promise.describe(0.5)] if promise is not None else []
    output.finish(document, *promised, *written, then=["head", "-n", 1, written[0]])


def _decided(
    recommended: str | None,
    risk: float | None,
    confidence: float,
    sources: Mapping[str, dict[str, Any] | None],
    progress: Progress,
) -> Decision:
    """Return the threshold of a recommendation, once it is sure that it may be used; or check what one is found by."""
    from axolotl_ivon.errors import IVONError

    if risk is not None:
        from axolotl_ivon.decisions.abstention import check_risk

        check_risk(risk, confidence)
        if recommended is not None:
            raise IVONError("--risk finds a threshold and --recommended has one; leave one of them out")
        if len(sources) > 1:
            raise IVONError("--risk: give one FILE; a threshold is of one way to generate")
        if None in sources.values():
            raise IVONError(
                f"--risk: {next(iter(sources))} has no .settings.json beside it, which says what it is drawn from"
            )
    decided = decision(recommended)
    if recommended is None:
        return decided
    if decided.threshold is None:
        raise IVONError(
            f"--recommended {recommended} has no threshold; `ivon-post sweep` finds one with --risk, and so does `mbr`"
        )
    for label, source in sources.items():
        own = source and source["mean_sha256"]
        if own and decided.mean_sha256 and own != decided.mean_sha256:
            raise IVONError(
                f"--recommended {recommended} was chosen for another adapter than {label} was generated with"
            )
    if decided.score != "agreement":
        progress.notify(
            "the threshold is of the probabilities that `eval` sees; of the outputs' agreement it promises nothing: "
            "find one for it with `ivon-post mbr --risk`"
        )
    return decided


def _clusters(clusters: str, embedding_model: str | None, similarity: float) -> Callable[..., Any]:
    """Return what finds the outputs of one meaning."""
    from axolotl_ivon.errors import IVONError

    if (clusters == "embedding") != (embedding_model is not None):
        raise IVONError("--clusters embedding needs --embedding-model, and nothing else does; give both or neither")
    if embedding_model is None:
        from axolotl_ivon.generation.uncertainty import by_answer

        return by_answer
    from axolotl_ivon.generation.embedding import Embedder, by_meaning

    return partial(by_meaning, embed=Embedder(embedding_model), similarity=similarity)


def _promise(result: Decoded, path: str, risk: float, confidence: float) -> Abstention:
    """Return the threshold that promises the risk."""
    import numpy as np

    from axolotl_ivon.decisions.abstention import certify
    from axolotl_ivon.errors import IVONError

    if not result.right:
        raise IVONError(f"--risk: {path} has prompts without a reference, and so nothing tells which choices are wrong")
    confidences = np.array([choice.uncertainty.confidence for choice in result.choices])
    return certify(confidences, np.array(result.right), risk, confidence)


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


_MEASURES = {
    "confidence": "confidence",
    "semantic_entropy": "semantic entropy",
    "expected_entropy": " within draws (expected)",
    "mutual_information": " between draws (mutual)",
}


def _print_uncertainty(results: dict[str, Decoded]) -> None:
    """Print how well each measure tells the wrong choices, what is answered, and the fields, where there are any."""
    lines: list[list[str]] = []
    for label, result in results.items():
        if result.uncertainty:
            lines.append([label, "", "", "", ""])
            for name, told in result.uncertainty.items():
                values = [decimal(told[key]) for key in ("mean", "auroc", "aurc", "prr")]
                lines.append([f" {_MEASURES[name]}", *values])
    if lines:
        print_table(["for a wrong choice", "mean", "AUROC", "AURC", "PRR"], lines)
    lines = []
    for label, result in results.items():
        if result.fields:
            lines.append([label, *[""] * 5])
        for path, told in result.fields.items():
            shares = [percent(told[key]) for key in ("confidence", "missing", "unparsable", "accuracy")]
            lines.append([f" {path}", *shares, decimal(told["auroc"])])
    if lines:
        print_table(["field", "confidence %", "missing %", "no JSON %", "acc %", "AUROC"], lines)
    for label, result in results.items():
        if result.coverage is not None:
            right = result.answered_accuracy
            correct = "" if right is None else f", {percent(right)} % of them right"
            click.echo(f"{label}: {percent(result.coverage)} % of the prompts answered{correct}")
