"""The page of `ivon-post report`: one HTML file that needs no network, no script and no other file.

What comes from files (questions, answers, names) is escaped by the template; only the pictures, which are made here, go
in as they are. A content security policy forbids the page to load anything, whatever gets into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import numpy as np

from ..errors import printable
from ..inspect.card import metrics_table
from ..inspect.info import describe
from ..metrics.outliers import outliers
from ..metrics.verdict import METRICS, measured
from ..plots.page import heat_map, histograms, memory_map, risk_coverage
from ..plots.reliability import reliability
from ..plots.style import to_svg
from ..plots.sweep import trade_off
from ..posterior.card import HEADER_LABELS, header_value
from ..records.evaluation import EvaluationRecord, ExampleRecord
from ..records.influence import SCORES, InfluenceRecord
from ..storage.format import file_names
from .findings import Findings

_SHOWN = 5  # examples of each kind
_STANDING_OUT = 20  # training rows
_LONGEST = 600  # characters of a question
_SCORES = {"confidence": "confidence", "entropy": "entropy (nats)", "mutual_information": "mutual information (nats)"}
_OOD_SCORE = {"confidence": "max_probability"}
_TASKS = {"classify": "a classification head", "generate": "the reference answer, token by token"}
_MANY = 12  # choices that are not listed any more


def page(adapter: str, findings: Findings) -> str:
    """Return the report on an adapter as HTML.

    Raises:
        IVONError: the adapter cannot be read.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    summary, sweep, evaluation = describe(adapter), findings.sweep, findings.evaluation
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = lambda figure: Markup(to_svg(figure))
    template = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    names = file_names([*evaluation.files, *evaluation.ood_files])
    return template.render(
        title=PurePath(str(adapter)).name or str(adapter),
        facts=_facts(summary),
        task=_setup(evaluation),
        verdicts=_verdicts(evaluation, names),
        table=_table(evaluation, names),
        ood_table=_ood_table(evaluation, names),
        recommended=sweep.sentences() if sweep else [],
        reliability={
            names[data]: [reliability({name: values}) for name, values in each.items()]
            for data in evaluation.files
            if (each := _curves(findings, data))
        },
        selective=_selective(findings, names),
        ood=_ood(findings, names),
        trade_off=trade_off(sweep) if sweep and sweep.grid else None,
        maps=[
            heat_map(title, {row["module"]: row[name] for row in summary["modules"]})
            for name, title in (("sigma_median", "median σ"), ("snr_median", "median |m|/σ"))
            if summary["posterior"]
        ],
        influence=_influence(findings.influence),
        examples=_examples(findings, names),
        version=summary["header"].get("library_version", ""),
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    header = summary["header"]
    facts = [
        ("base model", PurePath(str(summary["base_model"])).name),
        ("adapter", f"{summary['peft_type']}, r {summary['r']}, alpha {summary['lora_alpha']}"),
        ("weights", f"{summary['weights']:,} in {len(summary['modules'])} modules"),
    ]
    known = {name: label for name, label in HEADER_LABELS.items() if header.get(name)}
    facts += [(label, printable(header_value(header[name]))) for name, label in known.items()]
    for name, label in (("sigma", "σ, median"), ("snr", "signal-to-noise ratio |m|/σ, median")):
        if summary.get(name):
            facts.append((label, f"{summary[name]['0.5']:.3g}"))
    return facts


def _verdicts(evaluation: EvaluationRecord, names: Mapping[str, str]) -> list[str]:
    """Return what was measured, in words, each with its data, and the τ of draws."""
    lines = []
    for verdict in evaluation.verdicts:
        at = f", draws at τ {evaluation.tau:g}" if verdict.name.startswith("posterior") and evaluation.tau != 1 else ""
        lines.append(f"On {names.get(verdict.data, verdict.data)}{at}: {verdict.text}.")
    return lines


def _setup(evaluation: EvaluationRecord) -> str:
    task, choices = evaluation.task, evaluation.choices
    between = f" between {', '.join(choices)}" if 0 < len(choices) <= _MANY else ""
    meaning = f": {_TASKS[task]}" if task in _TASKS else ""
    return f"{task}{meaning}{between}; {evaluation.draws}, seed {evaluation.seed}"


def _table(evaluation: EvaluationRecord, names: Mapping[str, str]) -> dict[str, Any]:
    heads, cells = metrics_table(evaluation)
    lines = [
        {"data": f"{names[row.data]} ({row.examples})", "name": f"{row.name}{coverage}", "cells": figures}
        for row, (coverage, figures) in zip(evaluation.rows, cells, strict=True)
    ]
    return {"heads": heads, "lines": lines}


def _ood_table(evaluation: EvaluationRecord, names: Mapping[str, str]) -> list[dict[str, Any]]:
    lines = []
    for result in evaluation.ood:
        columns = ("auroc", "aupr", "fpr95")
        cells = [METRICS[name].write(getattr(result, name), getattr(result.se, name)) for name in columns]
        score = result.score.replace("_", " ")
        lines.append({"data": names[result.data], "name": result.name, "score": score, "cells": cells})
    return lines


def _variants(findings: Findings, data: str) -> list[str]:
    """Return the variants that there are examples of, without the pruned ones: a picture of five is legible."""
    rows = [row for row in findings.evaluation.rows if row.data == data]
    names = [row.name for row in rows if len(findings.values(data, row.name, "correct"))]
    return [name for name in names if "pruned" not in name] or names


def _predictions(findings: Findings, data: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
    return findings.values(data, variant, "confidence"), findings.values(data, variant, "correct")


def _curves(findings: Findings, data: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: _predictions(findings, data, name) for name in _variants(findings, data)}


def main_variant(findings: Findings, names: Sequence[str]) -> str | None:
    """Return the variant that a reader is to trust: the one that is recommended, else the posterior, else the last."""
    if not names:
        return None
    sweep, evaluation = findings.sweep, findings.evaluation
    if "recommended" in names:
        return "recommended"
    if sweep is not None:
        mean, scaled = sweep.tau == float("inf"), sweep.temperature != 1
        if mean and not sweep.ratio and not scaled and "mean" in names:
            return "mean"
        if (mean or sweep.tau == evaluation.tau) and sweep.ratio == evaluation.prune_ratio:
            name = "mean" if mean else "posterior"
            name += "-pruned" if sweep.ratio else ""
            name += "+temperature" if scaled else ""
            if name in names:
                return name
    return "posterior" if "posterior" in names else names[-1]


def _selective(findings: Findings, names: Mapping[str, str]) -> list[dict[str, Any]]:
    sections = []
    threshold, risk = findings.threshold, findings.sweep.risk if findings.sweep else None
    for data in findings.evaluation.files:
        curves = _curves(findings, data)
        if not curves:
            continue
        main = main_variant(findings, [row.name for row in findings.evaluation.rows if row.data == data])
        answered, text = None, ""
        if threshold is not None and main is not None:
            confidence, correct = _predictions(findings, data, main)
            kept = confidence >= threshold
            if kept.any():
                answered = float(kept.mean()), float(1 - correct[kept].mean())
                text = (
                    f"At a confidence of {threshold:.3f} or more {main} answers {100 * answered[0]:.1f} % of these "
                    f"examples, and {100 * answered[1]:.1f} % of those are wrong."
                )
            curves.setdefault(main, (confidence, correct))
        picture = risk_coverage(names[data], curves, risk if threshold is not None else None, answered)
        sections.append({"data": names[data], "picture": picture, "text": text})
    return sections


def _ood(findings: Findings, names: Mapping[str, str]) -> list[Any]:
    evaluation = findings.evaluation
    if not evaluation.ood:
        return []
    variants = _variants(findings, evaluation.files[0])
    main = "posterior" if "posterior" in variants else main_variant(findings, variants)  # draws have more to say
    if main is None:
        return []
    pictures = []
    for score, label in _SCORES.items():
        usual = np.concatenate([findings.values(path, main, score) for path in evaluation.files])
        others = {names[path]: findings.values(path, main, score) for path in evaluation.ood_files}
        if np.isnan(usual).any() or not all(len(v) and not np.isnan(v).any() for v in others.values()):
            continue
        key = (main, _OOD_SCORE.get(score, score))
        auroc = [measured(each.auroc, None, 1, 2) for each in evaluation.ood if (each.name, each.score) == key]
        pictures.append(histograms(label, usual, others, f"{main}: AUROC {', '.join(auroc)}" if auroc else main))
    return pictures


def _influence(rows: Sequence[InfluenceRecord]) -> dict[str, Any] | None:
    """Return the training rows whose sensitivity stands out, and where they lie among all."""
    order = sorted((row for row in rows if row.sensitivity is not None), key=lambda row: -(row.sensitivity or 0))
    if not order:
        return None
    scores = [name for name in SCORES if any(row.score(name) is not None for row in rows)]
    leverage, loss = (np.array([row.score(name) or 0 for row in order]) for name in ("leverage", "loss"))
    marked, positive = outliers([row.sensitivity or 0 for row in order]), (leverage > 0) & (loss > 0)
    marked &= np.arange(len(order)) < _STANDING_OUT
    picture = memory_map(leverage[positive], loss[positive], marked[positive]) if positive.any() else None
    lines = [
        {
            "line": row.line,
            "answer": _cut(row.answer or ""),
            "question": _cut(row.question or ""),
            "cells": ["–" if (value := row.score(name)) is None else f"{value:.3g}" for name in scores],
        }
        for row in order[: marked.sum()]
    ]
    return {"count": len(rows), "picture": picture, "heads": scores, "lines": lines}


def _cut(text: str, most: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"


def _examples(findings: Findings, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Return where the main variant is surest while right, surest while wrong, and least sure; none of them twice."""
    data = findings.evaluation.files
    main = main_variant(findings, _variants(findings, data[0])) if data else None
    if main is None:
        return None
    lines = [line for line in findings.examples if main in line.rows and line.data in data]
    lines.sort(key=lambda line: line.rows[main].confidence, reverse=True)
    judged = any(line.rows[main].right is not None for line in lines)  # else texts, which are right in part
    wrong = [line for line in lines if line.rows[main].right is False][:_SHOWN]
    surest = [line for line in lines if line.rows[main].right is not False][:_SHOWN]
    unsure = [line for line in reversed(lines) if line not in surest and line not in wrong][:_SHOWN]
    first = "Right, surest first" if judged else "Surest"
    kinds = {first: surest, "Wrong, surest first": wrong, "Least sure": unsure}
    return {
        "row": main,
        "kinds": {kind: [_example(line, main, names) for line in part] for kind, part in kinds.items()},
    }


def _example(line: ExampleRecord, main: str, names: Mapping[str, str]) -> dict[str, Any]:
    row, draws = line.rows[main], line.rows.get("posterior", line.rows[main])
    question = line.question or ""
    return {
        "where": f"{names[line.data]}, line {line.line}",
        "question": question if len(question) <= _LONGEST else f"{question[:_LONGEST]} …",
        "answer": (line.answer or "")[:_LONGEST],
        "prediction": row.prediction,
        "verdict": "" if row.right is None else "right" if row.right else "wrong",
        "accuracy": f"{100 * row.correct:.0f} % of its tokens right" if row.right is None else None,
        "confidence": f"{100 * row.confidence:.1f} %",
        "share": round(min(1.0, max(0.0, row.confidence)), 3),
        "disagreement": measured(draws.mutual_information, None, 1, 3),
    }
