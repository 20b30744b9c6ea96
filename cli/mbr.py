"""`ivon-post mbr`: choose one of many outputs by minimum Bayes risk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_ivon.errors import IVONError
from axolotl_ivon.metrics.verdict import METRICS

from . import _options as options
from ._progress import Progress
from ._tables import decimal, heads, percent, print_table

if TYPE_CHECKING:
    from axolotl_ivon.generation.mbr import MBRResult, MBRSettings


@click.command("mbr", cls=options.Sectioned)
@click.argument("files", metavar="[LABEL=]FILE...", nargs=-1, required=True)
@options.choice_option(
    "--utility",
    ["exact", "bleu", "chrf", "rouge", "bertscore"],
    "How well two outputs agree. exact: their answers are equal, which makes a majority vote.",
)
@options.answer_option
@click.option(
    "--embedding-model",
    metavar="MODEL",
    help="Folder or Hub id of a sentence-transformers model: outputs mean the same if the cosine of their embeddings "
    "is at least 0.8.  [default: if their answers are equal]",
)
@click.option("--fields", metavar="A,B.C", help="Fields of JSON answers that get a confidence of their own.")
@click.option("--recommended", metavar="FILE", help="Abstain below the threshold of a recommended.json.")
@options.risk_options("Half of the prompts are used for this test alone. All need references.")
@options.output_options("FILE-mbr")
@options.as_one("comparison", dict, "utility", "answer_regex", "embedding_model", "fields")
def command(
    files: tuple[str, ...],
    comparison: dict[str, Any],
    recommended: str | None,
    risk: float | None,
    confidence: float,
    output: options.OutputOptions,
) -> None:
    """Choose one output per prompt by minimum Bayes risk.

    Reads the FILEs that `ivon-post generate` writes, and chooses the output that the others agree with most (Daheim et
    al., ICLR 2025); of two equal ones the more probable. With references, prints the accuracy by the number of outputs,
    and how well disagreement among the members detects errors (AUROC). Writes the choices as LABEL.jsonl, and
    accuracy.png and .svg with a curve per FILE.

    \b
    Every line of LABEL.jsonl, and a second table, have the uncertainty of the outputs
      confidence            share of outputs that mean the same as the chosen one
      semantic_entropy      entropy of the meanings = expected_entropy + mutual_information
      expected_entropy      within draws: the question is open
      mutual_information    between draws: the model does not know

    \b
      ivon-post mbr mean.jsonl posterior.jsonl "10 % pruned=pruned.jsonl" --answer-regex gsm8k
      ivon-post mbr validation.jsonl -a gsm8k --risk 0.05 -o chosen
      ivon-post mbr test.jsonl -a gsm8k --recommended chosen/recommended.json
    """
    import numpy as np

    from axolotl_ivon.decisions.abstention import certify
    from axolotl_ivon.generation.fields import check_outputs
    from axolotl_ivon.generation.mbr import label_files, mbr, save_choices
    from axolotl_ivon.generation.nbest import read_nbest, read_source
    from axolotl_ivon.storage.atomic import check_folder

    with output.progress() as progress:
        paths = label_files(files)
        first = Path(next(iter(paths.values())))
        folder = output.given_path(str(first)) or first.with_name(f"{first.stem}-mbr")
        check_folder(folder, output.overwrite)
        settings = _settings(**comparison)
        sources = {label: read_source(path) for label, path in paths.items()}
        threshold = promise = None
        if risk is not None:
            _check_risk(risk, confidence, recommended, sources)
        elif recommended is not None:
            threshold, temperature = _recommended(recommended, sources, progress)
            settings = replace(settings, temperature=temperature)
        lists = {label: read_nbest(path) for label, path in paths.items()}
        unmatched = {}
        for label, nbests in lists.items():
            if settings.fields:
                check_outputs([text for nbest in nbests for text in nbest.texts], settings.fields, paths[label])
            unmatched[label], total, example = settings.answers.unmatched(nbests)
            if unmatched[label]:
                progress.notify(f"{label}: no answer in {unmatched[label]} of {total} outputs, {example} for one")
        results = {label: mbr(nbests, settings, progress) for label, nbests in lists.items()}
        if risk is not None:
            [(label, result)] = results.items()
            if not result.right:
                fix = "has prompts without a reference, and so nothing tells which choices are wrong"
                raise IVONError(f"--risk: {paths[label]} {fix}")
            confidences = np.array([choice.uncertainty.confidence for choice in result.choices])
            promise = certify(confidences, np.array(result.right), risk, confidence)
            threshold = promise.threshold
        if threshold is not None:
            results = {label: result.abstaining(threshold) for label, result in results.items()}
        progress.begin("writing")
        from axolotl_ivon.plots.scaling import scaling
        from axolotl_ivon.plots.style import save_figures
        from axolotl_ivon.records.recommendation import RECOMMENDED_FILE, Recommendation

        clusters = "embedding" if comparison["embedding_model"] else "exact"
        compared = {name: comparison[name] for name in ("utility", "answer_regex")}
        compared |= {"level": "sequence", "clusters": clusters}
        files_written = save_choices(results, folder)
        curves = {label: result.curve for label, result in results.items() if result.curve}
        if any(len(curve) > 1 for curve in curves.values()):  # points alone show nothing that the table does not
            files_written += save_figures({"accuracy": scaling(curves)}, folder)
        if promise is not None:
            values = {"objective": "risk", "score": "agreement", **promise.document(), "data": [paths[label]]}
            files_written.append(folder / RECOMMENDED_FILE)
            Recommendation.parse({**(sources[label] or {}), **values, **compared}, "mbr").save(files_written[-1])
        written = list(map(str, files_written))
    if not output.as_json:
        _print_accuracy(results, comparison["utility"])
        _print_uncertainty(results)
    documents = [
        {"label": label, "file": paths[label], "unmatched": unmatched[label], **result.document()}
        for label, result in results.items()
    ]
    document = {"accuracy": documents[0]["accuracy"], **compared, "results": documents, "files": written}
    document |= promise.document() if promise else {}
    output.finish(document, *([promise.describe(0.5)] if promise else []), *written, then=["head", "-n", 1, written[0]])


def _settings(utility: str, answer_regex: str | None, embedding_model: str | None, fields: str | None) -> MBRSettings:
    """Return how outputs are compared."""
    from axolotl_ivon.generation.embedding import by_meaning, load_embedding
    from axolotl_ivon.generation.fields import check_fields
    from axolotl_ivon.generation.mbr import MBRSettings
    from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor

    answers = AnswerExtractor(answer_regex)
    settings = MBRSettings(UTILITIES[utility](answers), answers, fields=() if fields is None else check_fields(fields))
    if embedding_model is None:
        return settings
    return replace(settings, clusters=partial(by_meaning, embed=load_embedding(embedding_model)))


def _check_risk(
    risk: float, confidence: float, recommended: str | None, sources: Mapping[str, dict[str, Any] | None]
) -> None:
    """Raise IVONError unless a threshold for the risk can be found."""
    from axolotl_ivon.decisions.abstention import check_risk

    check_risk(risk, confidence)
    if recommended is not None:
        raise IVONError("--risk finds a threshold and --recommended has one; leave one of them out")
    if len(sources) > 1:
        raise IVONError("--risk: give one FILE; a threshold is of one way to generate")
    for label, source in sources.items():
        if source is None:
            raise IVONError(f"--risk: {label} has no .settings.json beside it, which says what it is drawn from")


def _recommended(path: str, sources: Mapping[str, dict[str, Any] | None], progress: Progress) -> tuple[float, float]:
    """Return threshold and softmax temperature of a recommendation, which must be for the adapter of the outputs."""
    from axolotl_ivon.records.recommendation import Recommendation

    recommendation = Recommendation.load(path, "recommended")
    if recommendation.threshold is None:
        raise IVONError(
            f"--recommended {path} has no threshold; `ivon-post sweep` finds one with --risk, and so does `mbr`"
        )
    for label, source in sources.items():
        adapter = source and source["mean_sha256"]
        if source and adapter and recommendation.mean_sha256 not in (None, adapter, source.get("unpruned_sha256")):
            raise IVONError(f"--recommended {path} was chosen for another adapter than {label} was generated with")
    if recommendation.score != "agreement":
        progress.notify(options.OTHER_CONFIDENCE)
    return recommendation.threshold, recommendation.temperature


def _print_accuracy(results: dict[str, MBRResult], utility: str) -> None:
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
    columns = ["", "one", *(f"n = {n}" for n in numbers), *([] if utility == "exact" else [utility]), "AUROC"]
    print_table(columns, lines)


def _print_uncertainty(results: dict[str, MBRResult]) -> None:
    """Print how well each measure tells the wrong choices, what is answered, and the fields, where there are any."""
    names = {"confidence": "confidence", "semantic_entropy": "semantic entropy"}
    names |= {"expected_entropy": " within draws (expected)", "mutual_information": " between draws (mutual)"}
    measures: list[list[str]] = []
    fields: list[list[str]] = []
    for label, result in results.items():
        if result.uncertainty:
            measures.append([label])
        if result.fields:
            fields.append([label])
        for name, figures in result.uncertainty.items():
            areas = [METRICS[key].write(figures[key]) for key in ("auroc", "aurc")]
            measures.append([f" {names[name]}", decimal(figures["mean"]), *areas, decimal(figures["prr"])])
        for path, figures in result.fields.items():
            shares = [percent(figures[key]) for key in ("confidence", "missing", "unparsable", "accuracy")]
            fields.append([f" {path}", *shares, decimal(figures["auroc"])])
    if measures:
        print_table(["for a wrong choice", "mean", *heads(("auroc", "aurc")), "PRR"], measures)
    if fields:
        print_table(["field", "confidence %", "missing %", "no JSON %", "acc %", "AUROC"], fields)
    for label, result in results.items():
        if result.coverage is not None:
            right = result.answered_accuracy
            correct = "" if right is None else f", {percent(right)} % of them right"
            click.echo(f"{label}: {percent(result.coverage)} % of the prompts answered{correct}")
