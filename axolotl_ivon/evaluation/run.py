"""One evaluation from end to end: what `ivon-post eval` prints, and what a report shows. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, param_ref
from ..metrics.selective import is_below
from ..metrics.verdict import METRICS, REFERENCES, UNSEEN, Paired, examples_needed, figures, judge
from ..models.session import Loading
from ..posterior.adapter import SIGMA_SHA256, changes_base
from ..records.base import save_lines
from ..records.evaluation import Calibration, EvaluationRecord, ExampleRecord, Prediction, VariantResult, VerdictResult
from ..reporter import SILENT, Reporter
from .evaluate import Evaluation, EvaluationData, Sampling
from .variants import Variant, VariantChoice

if TYPE_CHECKING:
    from ..data.encode import EncodedExample
    from ..metrics.scores import Scores
    from .served import ServedModel


# Each verdict: a variant, and what it is compared with.
_QUESTIONS = (
    ("mean", "base"),
    ("posterior", "mean"),
    ("mean+temperature", "mean"),
    ("posterior+temperature", "mean+temperature"),
    ("recommended", "mean"),
)
_REFERENCES = {"base": "the base model", "mean": "the mean", "mean+temperature": "the mean at its own"}


@dataclass(frozen=True)
class Evaluated:
    """The outcome of an evaluation: the record, and beside it the scores of every variant."""

    record: EvaluationRecord
    evaluation: Evaluation
    variants: Sequence[Variant]
    scores: Sequence[Scores]

    def examples(self) -> Iterator[ExampleRecord]:
        """Yield what every variant predicts for every example."""
        return describe(self.evaluation, self.variants, self.scores)


def run(
    adapter: str | Path,
    data: EvaluationData,
    choice: VariantChoice = VariantChoice(),
    sampling: Sampling = Sampling(),
    loading: Loading = Loading(),
    reporter: Reporter = SILENT,
    output: str | None = None,
    served: ServedModel | None = None,
) -> Evaluated:
    """Evaluate variants of an adapter on data, with standard errors, differences and verdicts.

    Args:
        output: a file for the examples (`ExampleRecord`, a line each), or None.
        served: members on servers, in place of a model in memory.

    Raises:
        IVONError: as `Evaluation` and `evaluate` do; an unknown variant; nothing to calibrate; `output` cannot be
            written.
    """
    variants = choice.variants()
    to_calibrate = [v for v in variants if v.name in ("mean", "posterior")] if data.calibrate is not None else []
    if data.calibrate is not None and not to_calibrate:
        raise IVONError(
            f"{param_ref('calibrate')} fits a temperature for mean and posterior; have one of them in "
            f"{param_ref('rows')}"
        )
    evaluation = Evaluation(adapter, data, variants, loading, reporter, served)
    variants = [_without_threshold(v, evaluation.task, reporter) for v in variants]
    for kind, reason in {
        "base": _without_base(evaluation),
        "mean": served.members.lacks("mean") if served else "",
    }.items():
        lost = [v for v in variants if v.base is (kind == "base") and math.isinf(v.tau)] if reason else []
        variants = [variant for variant in variants if variant not in lost]
        if not variants:
            raise IVONError(f"{param_ref('rows')} {kind}: {reason}; name other rows")
        if lost:
            reporter.notify(f"no row for {_REFERENCES[kind]}: {reason}")
    to_calibrate = [variant for variant in to_calibrate if variant in variants]
    if served and evaluation.task == "generate":
        reporter.notify(
            "vLLM returns the 20 likeliest tokens: entropies and Brier scores take the others as one, and are at most "
            "the true ones"
        )
    calibration = None
    if to_calibrate:
        fitted = evaluation.temperatures(to_calibrate, sampling, reporter)
        temperatures = {variant.name: variant.temperature for variant in fitted}
        variants = [variant for variant in variants if variant.name not in temperatures] + fitted
        calibration = Calibration(
            data=str(data.calibrate), examples=len(evaluation.held_out), temperatures=temperatures
        )
    scores = evaluation.run(variants, sampling, reporter)
    if output is not None:
        save_lines(Path(output), describe(evaluation, variants, scores))
    reporter.begin("bootstrap")
    from .ood import detect

    header = evaluation.posterior.metadata
    rows = summarize(evaluation, variants, scores, sampling.samples)
    record = EvaluationRecord(
        rows=rows,
        ood=detect(evaluation, variants, scores, sampling.samples),
        verdicts=verdicts(rows),
        task=evaluation.task,
        choices=list(evaluation.choices),
        by_length=data.by_length,
        adapter=str(adapter),
        mean_sha256=header.get("mean_sha256"),
        sigma_sha256=header.get(SIGMA_SHA256) if any(variant.needs_sigma for variant in variants) else None,
        base_model=evaluation.base_model,
        samples=sampling.samples,
        tau=choice.tau,
        adapter_tau=evaluation.posterior.tau,
        prune_ratio=choice.ratio,
        seed=sampling.seed,
        calibration=calibration,
        output=output,
    )
    return Evaluated(record, evaluation, variants, scores)


def _without_base(evaluation: Evaluation) -> str:
    """Return why the model without its adapter is not the base model; empty if it is."""
    config, served = evaluation.posterior.config, evaluation.served
    if served and (reason := served.members.lacks("base")):
        return reason
    if evaluation.task == "classify" and config.get("modules_to_save"):
        # The trained head is among the adapter's saved modules, and the base model's own is random.
        return "its classification head is not trained"
    if changes_base(config):
        return f"init_lora_weights {config['init_lora_weights']} has changed its weights"
    if config.get("bias") not in (None, "none"):
        return f"bias {config['bias']} has trained its biases"
    return "layer_replication has repeated its layers" if config.get("layer_replication") else ""


def _without_threshold(variant: Variant, task: str, reporter: Reporter) -> Variant:
    """Return the variant without a threshold that is of something else than the confidence of one answer."""
    if variant.threshold is None or (task != "generate" and variant.score == "probability"):
        return variant
    what = "whole answers, and generate scores tokens" if variant.score == "probability" else "the agreement of outputs"
    reporter.notify(f"the recommended threshold was found for {what}; use it with `ivon-post mbr`")
    return replace(variant, threshold=None)


def summarize(
    evaluation: Evaluation, variants: Sequence[Variant], scores: Sequence[Scores], samples: int
) -> list[VariantResult]:
    """Return the results of every variant on every data file.

    Each has bootstrap standard errors, and differences to those of `REFERENCES` that are there. A variant with a
    threshold has a second row, "NAME, answered", for the examples that it answers.
    """
    import torch

    from ..metrics.bootstrap import bootstrap, differences, standard_error
    from ..metrics.scores import metrics

    rows: list[VariantResult] = []
    for path, numbers in evaluation.files.items():
        parts = {v.name: score.of_groups(torch.tensor(numbers)) for v, score in zip(variants, scores, strict=True)}
        values = {name: metrics(part) for name, part in parts.items()}
        resamples = {name: bootstrap(part) for name, part in parts.items()}
        answered: list[VariantResult] = []
        for variant in variants:
            name = variant.name
            row: dict[str, Any] = {
                "name": name,
                "data": path,
                "examples": len(numbers),
                "predictions": len(parts[name].group),
                "samples": variant.passes(samples),
                **({} if variant.temperature == 1 else {"temperature": variant.temperature}),
                **values[name],
                "se": {metric: standard_error(drawn) for metric, drawn in resamples[name].items()},
            }
            for other in REFERENCES:
                if other in values and other != name:
                    paired = differences(values[name], values[other], resamples[name], resamples[other])
                    row[f"versus_{other}"] = {metric: each._asdict() for metric, each in paired.items()}
            rows.append(VariantResult.model_validate(row))
            if variant.threshold is not None:
                answered.append(_answered(variant, variant.threshold, path, parts[name], samples))
        rows += answered
    return rows


def _answered(variant: Variant, threshold: float, path: str, scores: Scores, samples: int) -> VariantResult:
    """Return the results on the examples of a file whose confidence reaches the variant's threshold."""
    import torch

    from ..metrics.bootstrap import standard_errors
    from ..metrics.scores import metrics
    from ..metrics.selective import upper_bound

    part = scores.where(torch.tensor([not is_below(each, threshold) for each in scores.confidence.tolist()]))
    count = len(part.group)
    empty: dict[str, Any] = dict.fromkeys(metrics(scores))
    return VariantResult(
        name=f"{variant.name}, answered",
        data=path,
        examples=count,
        predictions=count,
        samples=variant.passes(samples),
        coverage=count / len(scores.group),
        threshold=threshold,
        error_bound=upper_bound(int((1 - part.correct).sum()), count, 0.95),
        se=standard_errors(part) if count else empty,  # type: ignore[arg-type]  # pydantic makes it `Metrics`
        **(metrics(part) if count else empty),
    )


def verdicts(rows: Sequence[VariantResult]) -> list[VerdictResult]:
    """Return what the NLL says, file by file: mean against base model, draws against mean, and what T changes."""
    return [
        _verdict(row, than)
        for path in dict.fromkeys(row.data for row in rows)
        for name, than in _QUESTIONS
        for row in rows
        if (row.data, row.name) == (path, name) and "nll" in row.versus(than)
    ]


def _verdict(row: VariantResult, than: str) -> VerdictResult:
    versus = {metric: Paired(own.difference or 0.0, own.standard_error) for metric, own in row.versus(than).items()}
    difference, error = versus["nll"].difference, versus["nll"].standard_error or 0.0
    verdict = judge(difference, error, row.examples)
    # Whoever showed a difference that no table shows would have no use for it.
    telling = verdict == "within noise" and abs(difference) >= UNSEEN
    needed = examples_needed(row.examples, difference, error) if telling else None
    what, are, against, numbers = "the mean", "is", _REFERENCES[than], figures(versus)
    if row.name == "recommended":
        what = "what is recommended"
    elif not row.name.startswith("mean"):
        what, are = ("one draw", "is") if row.samples == 1 else (f"{row.samples} draws", "are")
    what += f" at {'their' if are == 'are' else 'its'} T" if "temperature" in row.name else ""
    if verdict == "the same":
        text = f"{what} and {against} predict the same"
    elif verdict == "too few examples":
        text = f"{row.examples} examples are too few to tell {what} from {against}: {numbers}"
    elif verdict == "within noise":
        enough = f"about {needed:,}" if needed and needed <= 10**6 else "more than a million"
        others = [METRICS[m].label for m in ("accuracy", "ece") if m in versus and versus[m].is_beyond_noise]
        but = f" in NLL, but not in {' and '.join(others)}" if others else ""
        text = f"{what} and {against} are within noise{but}: {numbers}"
        text += f"; {enough} examples would tell" if telling else ""
    else:
        text = f"{what} {are} {verdict} than {against}: {numbers}"
    return VerdictResult(
        data=row.data, name=row.name, than=than, metric="nll", difference=difference, standard_error=error,
        verdict=verdict, examples_needed=needed, text=text,
    )  # fmt: skip


def describe(evaluation: Evaluation, variants: Sequence[Variant], scores: Sequence[Scores]) -> Iterator[ExampleRecord]:
    """Yield for every example, of the data and then out of the distribution, what each variant predicts."""
    columns = {variant.name: _columns(score) for variant, score in zip(variants, scores, strict=True)}
    for variant in variants:
        if variant.threshold is not None:
            confidences = columns[variant.name]["confidence"]
            columns[variant.name]["abstain"] = [is_below(each, variant.threshold) for each in confidences]
    for path, numbers in [*evaluation.files.items(), *evaluation.ood_files.items()]:
        for number in numbers:
            example, item = evaluation.examples[number], evaluation.items[number]
            # Without a label no prediction is right.
            known = {"correct": 0.0, "nll": math.nan} if number in evaluation.of_no_label else {}
            rows = {
                name: _prediction(
                    evaluation.choices, item, {**{name: column[number] for name, column in of.items()}, **known}
                )
                for name, of in columns.items()
            }
            question = example.question
            yield ExampleRecord(data=path, line=example.line, question=question, answer=example.answer, rows=rows)


def _columns(scores: Scores) -> dict[str, list[Any]]:
    """Return each figure by example, the mean over its predictions, and the probabilities where they are kept."""
    figures = {
        "correct": scores.correct,
        "confidence": scores.confidence,
        "nll": scores.nll,
        "entropy": scores.entropy,
        "mutual_information": scores.entropy - scores.expected_entropy,
    }
    columns: dict[str, list[Any]] = {name: scores.mean_of_groups(values).tolist() for name, values in figures.items()}
    if scores.probabilities is not None:
        columns["probabilities"] = scores.probabilities[scores.group.argsort()].tolist()
    return columns


def _prediction(choices: Sequence[str], item: EncodedExample, values: dict[str, Any]) -> Prediction:
    share, kept = values.pop("correct"), values.pop("probabilities", None)
    values = {name: None if math.isnan(value) else value for name, value in values.items()}
    if kept is None or not choices:
        return Prediction(tokens=len(item.targets), accuracy=share, **values)
    probabilities = dict(zip(choices, kept, strict=True))
    best = max(probabilities, key=probabilities.__getitem__)
    return Prediction(probabilities=probabilities, prediction=best, right=bool(share), **values)
