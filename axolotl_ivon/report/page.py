"""The page of `ivon-post report`: one HTML file that needs no network, no script and no other file.

What comes from files (questions, answers, names) is escaped by the template; only the pictures, which are made here, go
in as they are. A content security policy forbids the page to load anything, whatever gets into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ..errors import printable
from ..inspect.card import COLUMNS, measured
from ..inspect.info import describe
from ..plots import pictures
from ..posterior.card import HEADER_LABELS, header_value
from ..records.influence import SCORES
from ..storage.atomic import new_file
from .measured import Measured, threshold_of

_SHOWN = 5  # examples of each kind
_SUSPICIOUS = 20  # training rows
_LONGEST = 600  # characters of a question
_SCORES = {"confidence": "confidence", "entropy": "entropy (nats)", "mutual_information": "mutual information (nats)"}
_OOD_SCORE = {"confidence": "max_probability"}
_TASKS = {"classify": "a classification head", "generate": "the reference answer, token by token"}
_MANY = 12  # choices that are not listed any more
_WIDE = 560  # CSS pixels that a picture takes of a column


def save(path: Path, text: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        IVONError: the file cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(adapter: str, known: Measured) -> str:
    """Return the report on an adapter as HTML.

    Raises:
        IVONError: the adapter cannot be read.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    facts = describe(adapter)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = Markup
    template = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    names = _short_names([str(row["data"]) for row in known.document.get("rows", ())] + known.ood_files())
    return template.render(
        title=PurePath(str(adapter)).name or str(adapter),
        facts=_facts(facts),
        task=_setup(known.document),
        verdicts=[str(one.get("text")) for one in known.document.get("verdicts") or () if isinstance(one, dict)],
        table=_table(known.document, names),
        ood_table=_ood_table(known.document, names),
        promise=_promise(known.recommended),
        recommended=_recommended(known.recommended),
        reliability=_reliability(known, names),
        selective=_selective(known, names),
        ood=_ood(known, names),
        sweep=_sweep(known.recommended),
        maps=_maps(facts),
        influence=_influence(known.influence),
        examples=_examples(known),
        version=facts["header"].get("library_version", ""),
    )


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a name without its folder for every file, unless two share it."""
    short = {path: PurePath(path).name for path in paths}
    return {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    base = PurePath(str(facts["base_model"])).name
    told = [
        ("base model", base),
        ("adapter", f"{facts['peft_type']}, r {facts['r']}, alpha {facts['lora_alpha']}"),
        ("weights", f"{facts['weights']:,} in {len(facts['modules'])} modules"),
    ]
    header = facts["header"]
    told += [
        (label, printable(header_value(header[name]))) for name, label in HEADER_LABELS.items() if header.get(name)
    ]
    for name, label in (("sigma", "σ, median"), ("snr", "signal-to-noise ratio |m|/σ, median")):
        if facts.get(name):
            told.append((label, f"{facts[name]['0.5']:.3g}"))
    return told


def _setup(document: Mapping[str, Any]) -> str:
    if not document:
        return ""
    task = str(document.get("task"))
    choices = document.get("choices") or []
    between = f" between {', '.join(map(str, choices))}" if 0 < len(choices) <= _MANY else ""
    told = f": {_TASKS[task]}" if task in _TASKS else ""
    return (
        f"{task}{told}{between}; {document.get('samples')} draws at τ {document.get('tau')}, "
        f"pruning ratio {document.get('prune_ratio')}, seed {document.get('seed')}"
    )


def _table(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    rows = document.get("rows") or []
    columns = {
        metric: how
        for metric, how in COLUMNS.items()
        if any(row.get(metric) is not None for row in rows)
        and (metric != "perplexity" or document.get("task") == "generate")
    }
    lines = []
    for row in rows:
        errors = row.get("se") if isinstance(row.get("se"), dict) else {}
        name = str(row["name"])
        if isinstance(row.get("coverage"), float):
            name += f" ({100 * row['coverage']:.1f} %)"
        cells = [
            measured(row.get(m), (errors or {}).get(m), factor, digits) for m, (_, factor, digits) in columns.items()
        ]
        lines.append({"data": f"{names[str(row['data'])]} ({row['examples']})", "name": name, "cells": cells})
    return {"heads": [heading for heading, _, _ in columns.values()], "lines": lines}


def _ood_table(document: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    lines = []
    for one in document.get("ood") or ():
        errors = one.get("se") if isinstance(one.get("se"), dict) else {}
        figures = [
            measured(one.get(name), (errors or {}).get(name), factor, digits)
            for name, factor, digits in (("auroc", 1, 3), ("aupr", 1, 3), ("fpr95", 100, 1))
        ]
        score = str(one["score"]).replace("_", " ")
        lines.append({"data": names[str(one["data"])], "name": one["name"], "score": score, "cells": figures})
    return lines


def _row_names(known: Measured, data: str) -> list[str]:
    """Return the rows that there are examples of, the pruned ones left out."""
    found = [str(row["name"]) for row in known.document.get("rows") or () if row["data"] == data]
    return pictures.rows_in_order([name for name in found if len(known.of(data, name, "right"))])


def _data_files(known: Measured) -> list[str]:
    return list(dict.fromkeys(str(row["data"]) for row in known.document.get("rows") or ()))


def _reliability(known: Measured, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for data in _data_files(known):
        drawn = [
            pictures.reliability(name, known.of(data, name, "confidence"), known.of(data, name, "right"))
            for name in _row_names(known, data)
        ]
        if drawn:
            found.append({"data": names[data], "pictures": drawn})
    return found


def main_row(known: Measured, names: Sequence[str]) -> str | None:
    """Return the row that a reader is to trust: the one that is recommended, else the posterior, else the last."""
    if not names:
        return None
    wanted, document = known.recommended, known.document
    if "recommended" in names:
        return "recommended"
    plain = wanted.get("tau") == "inf" and not wanted.get("ratio") and wanted.get("temperature", 1) == 1
    if plain and "mean" in names:
        return "mean"
    same = wanted and all(
        float(wanted.get(own, "nan")) == float(document.get(other, "nan"))
        for own, other in (("tau", "tau"), ("ratio", "prune_ratio"))
    )
    if same:
        name = "mean" if wanted.get("tau") == "inf" else "posterior"
        name += "-pruned" if wanted.get("ratio") else ""
        name += "+temperature" if wanted.get("temperature", 1) != 1 else ""
        if name in names:
            return name
    return "posterior" if "posterior" in names else names[-1]


def _selective(known: Measured, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    threshold, risk = threshold_of(known.recommended), known.recommended.get("risk")
    for data in _data_files(known):
        every = [str(row["name"]) for row in known.document["rows"] if row["data"] == data]
        rows = {
            name: (known.of(data, name, "confidence"), known.of(data, name, "right"))
            for name in _row_names(known, data)
        }
        if not rows:
            continue
        main, answered, told = main_row(known, every), None, ""
        if threshold is not None and main is not None:
            confidence, right = known.of(data, main, "confidence"), known.of(data, main, "right")
            kept = confidence >= threshold
            if kept.any():
                answered = float(kept.mean()), float(1 - right[kept].mean())
                told = (
                    f"From confidence {measured(threshold, None, 1, 3)} on, {main} answers "
                    f"{100 * answered[0]:.1f} % of these examples, and {100 * answered[1]:.1f} % of those are wrong."
                )
            rows.setdefault(main, (confidence, right))
        picture = pictures.risk_coverage(names[data], rows, risk if threshold is not None else None, answered)
        found.append({"data": names[data], "picture": picture, "told": told})
    return found


def _ood(known: Measured, names: Mapping[str, str]) -> list[str]:
    files, data = known.ood_files(), _data_files(known)
    if not files or not data:
        return []
    rows = _row_names(known, data[0])
    main = "posterior" if "posterior" in rows else main_row(known, rows)  # draws have more to say
    if main is None:
        return []
    drawn = []
    for score, label in _SCORES.items():
        usual = np.concatenate([known.of(path, main, score) for path in data])
        others = {names[path]: known.of(path, main, score) for path in files}
        if np.isnan(usual).any() or not all(len(v) and not np.isnan(v).any() for v in others.values()):
            continue
        told = [
            measured(one.get("auroc"), None, 1, 2)
            for one in known.document.get("ood") or ()
            if one["name"] == main and one["score"] == _OOD_SCORE.get(score, score)
        ]
        drawn.append(pictures.histograms(label, usual, others, f"{main}: AUROC {', '.join(told)}" if told else main))
    return drawn


def _sweep(recommended: Mapping[str, Any]) -> dict[str, str] | None:
    grid = pictures.grid_of(recommended) if recommended else None
    return dict(zip(("picture", "told"), pictures.sweep_picture(grid), strict=True)) if grid else None


def _recommended(recommended: Mapping[str, Any]) -> list[str]:
    if not recommended:
        return []
    data = recommended.get("data")
    where = ", ".join(PurePath(str(file)).name for file in data) if isinstance(data, list) else "validation data"
    scaled = recommended.get("temperature", 1)
    verdict = recommended.get("verdict")
    return [
        f"Recommended by sweep, on {where}: τ {recommended.get('tau')}, pruning ratio {recommended.get('ratio')}"
        + (f", the output at temperature {measured(scaled, None, 1, 3)}" if scaled != 1 else "")
        + ".",
        *([str(verdict["text"])] if isinstance(verdict, dict) and verdict.get("text") else []),
    ]


def _promise(recommended: Mapping[str, Any]) -> str:
    if threshold_of(recommended) is None:
        return ""
    threshold, risk, confidence, coverage = (
        measured(recommended.get(name), None, factor, digits)
        for name, factor, digits in (
            ("threshold", 1, 3),
            ("risk", 100, 1),
            ("confidence", 100, 0),
            ("coverage", 100, 1),
        )
    )
    return (
        f"Promised by sweep: answer from confidence {threshold} on, and at most {risk}\u00a0% of the answers are "
        f"wrong, with {confidence}\u00a0% confidence, for data like that it was found on, of which it answered "
        f"{coverage}\u00a0%."
    )


def _maps(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not facts["posterior"]:
        return []
    rows = facts["modules"]
    drawn = [
        pictures.heat_map(title, {row["module"]: row[name] for row in rows})
        for name, title in (("sigma_median", "median σ"), ("snr_median", "median |m|/σ"))
    ]
    return [{"picture": picture, "wide": pictures.width(picture) > _WIDE} for picture in drawn]


def _influence(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the training rows with the highest sensitivity, and where they lie among all."""
    scored = (i for i, row in enumerate(rows) if row["sensitivity"] is not None)
    order = sorted(scored, key=lambda i: -rows[i]["sensitivity"])
    if not order:
        return None
    scores = [name for name in SCORES if any(row[name] is not None for row in rows)]
    first = order[:_SUSPICIOUS]
    leverage, loss = (np.array([float(rows[i][name] or 0) for i in order]) for name in ("leverage", "loss"))
    marked, positive = np.arange(len(order)) < len(first), (leverage > 0) & (loss > 0)
    picture = None
    if positive.any():
        picture = pictures.memory_map(leverage[positive], loss[positive], marked[positive])
    return {
        "count": len(rows),
        "picture": picture,
        "heads": scores,
        "lines": [
            {
                "line": rows[i]["line"],
                "answer": _cut(rows[i].get("answer", "")),
                "question": _cut(rows[i].get("question", "")),
                "cells": ["–" if rows[i][name] is None else f"{rows[i][name]:.3g}" for name in scores],
            }
            for i in first
        ],
    }


def _cut(text: object, most: int = 80) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[:most]} …"


def _examples(known: Measured) -> dict[str, Any] | None:
    """Return what the main row is surest of, least sure of, and surest of while it is wrong."""
    data = _data_files(known)
    main = main_row(known, _row_names(known, data[0])) if data else None
    lines = [line for line in known.examples if main in line["rows"] and line["data"] in data]
    if not lines:
        return None

    def confidence(line: Mapping[str, Any]) -> float:
        return float(line["rows"][main]["confidence"])

    lines.sort(key=confidence, reverse=True)
    wrong = [line for line in lines if line["rows"][main].get("right") is False]
    kinds = {"Surest": lines[:_SHOWN], "Sure, and wrong": wrong[:_SHOWN], "Least sure": lines[::-1][:_SHOWN]}
    return {
        "row": main,
        "kinds": {kind: [_example(line, str(main)) for line in chosen] for kind, chosen in kinds.items()},
    }


def _example(line: Mapping[str, Any], main: str) -> dict[str, Any]:
    row, draws = line["rows"][main], line["rows"].get("posterior", line["rows"][main])
    question = str(line.get("question", ""))
    right = row.get("right")
    return {
        "where": f"{PurePath(str(line['data'])).name}, line {line.get('line')}",
        "question": question if len(question) <= _LONGEST else f"{question[:_LONGEST]} …",
        "answer": str(line.get("answer", ""))[:_LONGEST],
        "prediction": None if row.get("prediction") is None else str(row["prediction"]),
        "verdict": "" if right is None else "right" if right else "wrong",
        "accuracy": None if right is not None else f"{100 * float(row['accuracy']):.0f} % of its tokens right",
        "confidence": f"{100 * float(row['confidence']):.1f} %",
        "share": round(min(1.0, max(0.0, float(row["confidence"]))), 3),
        "disagreement": measured(draws.get("mutual_information"), None, 1, 3),
    }
