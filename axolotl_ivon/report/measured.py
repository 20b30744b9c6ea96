"""Evaluate for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..records.evaluation import EvaluationRecord, ExampleRecord
from ..reporter import Reporter
from .findings import Findings


def measure(
    adapter: str, data: Sequence[str], ood: Sequence[str], findings: Findings, sweep: str | None, reporter: Reporter
) -> Findings:
    """Evaluate base model, mean and posterior as `eval` does by default, and as the sweep recommends."""
    from ..decisions.abstention import with_answered
    from ..decisions.sweep import number, read_recommended
    from ..evaluation.evaluate import Evaluation, Variant, choose_rows, count_passes, summarize
    from ..evaluation.examples import describe
    from ..evaluation.ood import detect
    from ..metrics.verdict import verdicts
    from ..posterior.adapter import Adapter

    tau, ratio = read_recommended(sweep, Adapter(adapter).metadata or None) if sweep else (1.0, 0.0)
    names = ["base", "mean", "posterior", *(["mean-pruned", "posterior-pruned"] if ratio else [])]
    rows, run = choose_rows(names, tau, ratio), {"samples": 10, "seed": 0}
    recommended, threshold = findings.sweep, findings.threshold
    if recommended and (recommended.temperature != 1 or threshold is not None):
        rows.append(Variant("recommended", tau, ratio, temperature=recommended.temperature))
    evaluation = Evaluation(adapter, data, rows=rows, ood=ood, begin=lambda doing: reporter.begin(doing, 0))
    rows = evaluation.meaningful(rows, reporter.notify)
    advance = reporter.begin("evaluating", count_passes(rows, 10) * len(evaluation.items))
    scores = evaluation.run(rows, **run, progress=advance, notify=reporter.notify)
    reporter.begin("bootstrap", 0)
    summary = summarize(evaluation, rows, scores, 10)
    if threshold is not None and evaluation.task != "generate" and rows[-1].name == "recommended":
        summary = with_answered(summary, "recommended", evaluation.files, scores[-1], threshold)
    document: dict[str, Any] = {
        "rows": summary,
        "ood": detect(evaluation, rows, scores, 10),
        "verdicts": verdicts(summary),
        "task": evaluation.task,
        "choices": list(evaluation.choices),
        **run,
        "tau": number(tau),
        "prune_ratio": ratio,
    }
    examples = [ExampleRecord.parse(line, "the evaluation") for line in describe(evaluation, rows, scores)]
    return replace(findings, evaluation=EvaluationRecord.parse(document, "the evaluation"), examples=examples)
