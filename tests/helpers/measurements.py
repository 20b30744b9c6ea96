"""What an evaluation would have written: two data files and another one, with a hostile example."""

from __future__ import annotations

import random
from typing import Any

import pytest

from axolotl_ivon.records.evaluation import EvaluationRecord, ExampleRecord
from axolotl_ivon.records.recommendation import Recommendation
from axolotl_ivon.report.findings import Findings

HOSTILE = "<script>document.title = 'owned'</script><img src=https://example.org/x.png onerror=alert(1)>$\\frac$"
VARIANTS = ("base", "mean", "posterior", "posterior+temperature")


def example(draw: random.Random, data: str, line: int) -> dict[str, Any]:
    answer = draw.choice("AB")
    rows = {}
    for name in VARIANTS:
        p = draw.betavariate(4, 2)
        prediction = answer if draw.random() < p else "AB"["BA".index(answer)]
        confidence = max(p, 1 - p)
        rows[name] = {
            "probabilities": {prediction: confidence, "AB"["BA".index(prediction)]: 1 - confidence},
            "prediction": prediction,
            "right": prediction == answer,
            "confidence": confidence,
            "nll": 0.5,
            "entropy": 0.6 * draw.random(),
            "mutual_information": 0.1 * draw.random() if name == "posterior" else None if "+" in name else 0.0,
        }
    return {"data": data, "line": line, "question": f"question {line}", "answer": answer, "rows": rows}


def recommendation(error: float = 0.03, **changes: Any) -> Recommendation:
    """A sweep over three τ and two ratios that chooses τ 2; `error` is the standard error of both its metrics."""
    grid = [
        {"tau": tau, "ratio": ratio, "front": tau == 2.0, "reported_on": {},
         "chosen_on": {"accuracy": 0.8 + 0.01 * (tau == 2.0) - 0.1 * ratio, "ece": 0.05 + 0.1 * ratio}}
        for ratio in (0.0, 0.3) for tau in (0.5, 2.0, "inf")
    ]  # fmt: skip
    document = {
        "tau": 2.0, "ratio": 0.0, "objective": "nll", "data": [f"{HOSTILE}.jsonl"], "grid": grid,
        "chosen_on": {"accuracy": 0.81, "ece": 0.05}, "reported_on": {"se": {"accuracy": error, "ece": error}},
        "verdict": {"outcome": "within noise", "text": "within noise"}, **changes,
    }  # fmt: skip
    return Recommendation.parse(document, "made up")


@pytest.fixture(scope="session")
def known() -> Findings:
    """An evaluation with its examples and a sweep that promised a threshold."""
    draw = random.Random(0)
    data = {"/some/where/test.jsonl": 40, f"{HOSTILE}.jsonl": 12, "other.jsonl": 25}
    lines = [example(draw, name, i + 1) for name, count in data.items() for i in range(count)]
    lines[3]["question"] = lines[3]["answer"] = HOSTILE
    for row in lines[3]["rows"].values():
        row.update(prediction=HOSTILE, right=False, confidence=0.999)
    lines[4]["question"] = "long " * 1000
    lines[4]["rows"]["posterior"]["confidence"] = 1.0
    rows: list[dict[str, Any]] = []
    for name in list(data)[:2]:
        for variant in VARIANTS:
            right = [line["rows"][variant]["right"] for line in lines if line["data"] == name]
            more = ("nll", "brier", "auroc", "aurc", "cov_at_5risk")
            metrics = {"accuracy": sum(right) / len(right), **dict.fromkeys(more, 0.5), "ece": None}
            errors = {"accuracy": 0.03, "ece": None, **dict.fromkeys(more, 0.02)}
            rows.append({"name": variant, "data": name, "examples": len(right), **metrics, "se": errors})
    text = f"10 draws are better than {HOSTILE}"
    verdict = {"data": "", "name": "posterior", "than": "mean", "metric": "nll", "verdict": "better", "text": text}
    ood = [
        {"name": name, "data": "other.jsonl", "score": score, "auroc": 0.625, "aupr": 0.5, "fpr95": 0.8}
        for name in ("mean", "posterior")
        for score in ("max_probability", "entropy", "mutual_information")
    ]
    document = {
        "task": "choice", "choices": ["A", HOSTILE], "samples": 10, "tau": 2.0, "prune_ratio": 0.0, "seed": 0,
        "rows": rows, "verdicts": [verdict], "ood": ood,
    }  # fmt: skip
    return Findings(
        EvaluationRecord.parse(document, "made up"),
        [ExampleRecord.parse(line, "made up") for line in lines],
        recommendation(threshold=0.6, risk=0.2, confidence=0.9, coverage=0.7),
    )
