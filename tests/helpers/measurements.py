"""What an evaluation would have written: two data files and another one, with a hostile example."""

from __future__ import annotations

import random
from typing import Any

import pytest

from axolotl_ivon.report.measured import Measured

HOSTILE = "<script>document.title = 'owned'</script><img src=https://example.org/x.png onerror=alert(1)>$\\frac$"
ROWS = ("base", "mean", "posterior", "posterior+temperature")


def example(draw: random.Random, data: str, line: int) -> dict[str, Any]:
    answer = draw.choice("AB")
    rows = {}
    for name in ROWS:
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


def measurements() -> Measured:
    """Return them."""
    draw = random.Random(0)
    data = {"/home/me/test.jsonl": 40, f"{HOSTILE}.jsonl": 12, "other.jsonl": 25}
    lines = [example(draw, name, i + 1) for name, count in data.items() for i in range(count)]
    lines[3]["question"] = lines[3]["answer"] = HOSTILE
    for row in lines[3]["rows"].values():
        row.update(prediction=HOSTILE, right=False, confidence=0.999)
    lines[4]["question"] = "long " * 1000
    lines[4]["rows"]["posterior"]["confidence"] = 1.0
    document: dict[str, Any] = {
        "task": "choice", "choices": ["A", HOSTILE], "samples": 10, "tau": 2.0, "prune_ratio": 0.0, "seed": 0,
        "rows": [], "verdicts": [{"text": f"10 draws are better than {HOSTILE}"}],
    }  # fmt: skip
    for name in list(data)[:2]:
        for row in ROWS:
            right = [line["rows"][row]["right"] for line in lines if line["data"] == name]
            found = {"name": row, "data": name, "examples": len(right), "accuracy": sum(right) / len(right)}
            more = ("nll", "brier", "auroc", "aurc", "cov_at_5risk")
            errors = {"accuracy": 0.03, "ece": None, **dict.fromkeys(more, 0.02)}
            document["rows"].append({**found, **dict.fromkeys(more, 0.5), "ece": None, "se": errors})
    document["ood"] = [
        {"name": name, "data": "other.jsonl", "score": score, "auroc": 0.625, "aupr": 0.5, "fpr95": 0.8}
        for name in ("mean", "posterior")
        for score in ("max_probability", "entropy", "mutual_information")
    ]
    recommended = {
        "tau": 2.0, "ratio": 0.0, "objective": "nll", "data": [f"{HOSTILE}.jsonl"],
        "chosen_on": {"accuracy": 0.81, "ece": 0.05}, "reported_on": {}, "verdict": {"text": "within noise"},
        "threshold": 0.6, "risk": 0.2, "confidence": 0.9, "coverage": 0.7,
        "grid": [
            {"tau": tau, "ratio": ratio, "front": tau == 2.0, "reported_on": {},
             "chosen_on": {"accuracy": 0.8 + 0.01 * float(tau == 2.0) - 0.1 * ratio, "ece": 0.05 + 0.1 * ratio}}
            for ratio in (0.0, 0.3) for tau in (0.5, 2.0, "inf")
        ],
    }  # fmt: skip
    return Measured(document, lines, recommended)


@pytest.fixture
def known() -> Measured:
    return measurements()
