"""What a report shows of measurements: read from what `eval` and `sweep` have written, or measured now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IVONError, param_ref
from ..storage.format import read_json, read_lines


@dataclass(frozen=True)
class Measured:
    """What is known of an adapter's predictions.

    Attributes:
        document: what `ivon-post eval --json` prints; empty if nothing was evaluated.
        examples: what `ivon-post eval --output` writes, a dictionary a line.
        recommended: recommended.json of `ivon-post sweep`, or empty.
        influence: what `ivon-post influence --output` writes, a dictionary a training row, or empty.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    recommended: Mapping[str, Any] = field(default_factory=dict)
    influence: Sequence[Mapping[str, Any]] = ()

    def of(self, data: str, row: str, figure: str) -> np.ndarray:
        """Return a figure of a row for the examples of a file, shape (n,), float64; NaN where there is none.

        `figure` is a key of the row, or "right": 1 or 0, or for generated text the share of tokens that are.
        """
        found = [line["rows"][row] for line in self.examples if line["data"] == data and row in line["rows"]]
        if figure == "right":
            return np.array([float(each["right"] if "right" in each else each["accuracy"]) for each in found])
        return np.array([math.nan if each.get(figure) is None else float(each[figure]) for each in found])

    def ood_files(self) -> list[str]:
        """Return the files that are to be told from the data."""
        return list(dict.fromkeys(str(one["data"]) for one in self.document.get("ood") or ()))


def read(
    metadata: Mapping[str, str],
    results: Path | None = None,
    examples: Path | None = None,
    recommended: Path | None = None,
) -> Measured:
    """Read what was measured of the adapter with the header `metadata`.

    `examples` is by default the file that `results` names, where it is still there.

    Raises:
        IVONError: a file cannot be read, is no such file, or is another adapter's or another evaluation's.
    """
    document: Mapping[str, Any] = {}
    lines: list[Mapping[str, Any]] = []
    if results is not None:
        document = _read_of_adapter(results, "results", "rows", "`ivon-post eval --json`", metadata)
        _check_rows(document, f"{param_ref('results')} {results}")
        if examples is None and document.get("output"):
            named = Path(str(document["output"]))
            examples = next((path for path in (named, results.parent / named.name) if path.is_file()), None)
        if examples is not None:
            lines = _read_examples(examples, document)
    elif examples is not None:
        raise IVONError(f"{param_ref('examples')} {examples}: give the {param_ref('results')} that belong to it too")
    sweep: Mapping[str, Any] = {}
    if recommended is not None:
        sweep = _read_of_adapter(recommended, "recommended", "tau", "`ivon-post sweep`", metadata)
    return Measured(document, lines, sweep)


def _read_of_adapter(path: Path, name: str, key: str, whence: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON object in `path`, which the parameter `name` gave, if it has `key` and is of this adapter.

    Raises:
        IVONError: it cannot be read, is no such file, or is another adapter's.
    """
    told = f"{param_ref(name)} {path}"
    try:
        facts = read_json(path)
    except IVONError as error:
        raise IVONError(f"{param_ref(name)} cannot be read: {error}; {whence} writes it") from None
    if key not in facts:
        raise IVONError(f"{told}: it has no `{key}`; {whence} writes it")
    own = facts.get("mean_sha256")
    if own is None:
        raise IVONError(f"{told} does not say of which adapter it is (mean_sha256); write it anew with {whence}")
    if own != metadata.get("mean_sha256"):
        raise IVONError(
            f"{told} is of another adapter, {facts.get('adapter')} (mean_sha256 differs); write it anew with {whence}"
        )
    return facts


def _check_rows(document: Mapping[str, Any], told: str) -> None:
    rows, ood = document["rows"], document.get("ood")
    fine = isinstance(rows, list) and bool(rows) and isinstance(ood, (list, type(None)))
    fine = fine and all(isinstance(row, dict) and {"name", "data", "examples"} <= row.keys() for row in rows)
    if not fine or not all(isinstance(one, dict) and {"name", "data", "score"} <= one.keys() for one in ood or ()):
        raise IVONError(f"{told}: it does not hold what `ivon-post eval --json` prints")


def _read_examples(path: Path, document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Read the examples of an evaluation, and see that they are of this one."""
    told = f"{param_ref('examples')} {path}"
    lines: list[Mapping[str, Any]] = []
    for source, line in read_lines(path, "examples"):
        rows = line.get("rows")
        fine = isinstance(rows, dict) and isinstance(line.get("data"), str)
        if not fine or not all(_is_row(row) for row in rows.values()):  # type: ignore[union-attr]
            raise IVONError(f"{source}: it is no line of what `ivon-post eval` writes with {param_ref('output')}")
        lines.append(line)
    measured = Measured(document, lines)
    named = {name for line in lines for name in line["rows"]}
    for row in document["rows"]:
        if "coverage" in row and row["name"] not in named:  # a part of another row's
            continue
        right = measured.of(row["data"], row["name"], "right")
        accuracy = row.get("accuracy")
        one_each = row.get("predictions", row["examples"]) == row["examples"]
        if len(right) != row["examples"] or (one_each and accuracy is not None and abs(right.mean() - accuracy) > 1e-6):
            raise IVONError(
                f"{told} is of another evaluation: it does not agree with {row['name']} on {row['data']}; "
                f"evaluate once with both {param_ref('output')} and JSON"
            )
    return lines


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    numbers = [row.get("right", row.get("accuracy")), row.get("confidence")]
    numbers += [row[name] for name in ("entropy", "mutual_information") if row.get(name) is not None]
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise IVONError if `page.save` would not write `path`: worth asking before the evaluation."""
    named = f"{param_ref('output')} {path}"
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "there is no such folder"
        raise IVONError(f"{named}: {what}; give a file in a folder that exists")
    if path.exists() and not overwrite:
        raise IVONError(f"{named} exists; choose another name, or overwrite it with {param_ref('overwrite')}")


def measure(
    adapter: str,
    data: Sequence[str],
    *,
    ood: Sequence[str] = (),
    calibrate: str | None = None,
    tau: float | None = None,
    ratio: float | None = None,
    recommended: Mapping[str, Any] | None = None,
    run: Mapping[str, Any],
    begin: Callable[[str, int], Callable[[int], None] | None] = lambda doing, total: None,
    notify: Callable[[str], None] = lambda message: None,
    **loading: Any,
) -> Measured:
    """Evaluate base model, mean and posterior on `data`, and on `ood` how well they know it for other data.

    Args:
        calibrate: validation data, for the rows at a fitted temperature.
        tau, ratio: of the posterior, by default those of `recommended`, else 1 and 0; with a ratio above 0 the pruned
            rows are there too.
        recommended: recommended.json of a sweep.
        run: what `evaluation.evaluate` is called with.
        begin: told what is done and how many examples it takes; returns what hears of each.
        loading: further parameters of `Evaluation`.

    Raises:
        IVONError: as `Evaluation` does.
    """
    from ..decisions.abstention import with_answered
    from ..evaluation.evaluate import Evaluation, Variant, calibrated_rows, choose_rows, count_passes, summarize
    from ..evaluation.examples import describe
    from ..evaluation.ood import detect
    from ..metrics.verdict import verdicts

    recommended = recommended or {}
    tau, ratio = (
        _number(name, recommended.get(name, default)) if value is None else value
        for name, value, default in (("tau", tau, 1.0), ("ratio", ratio, 0.0))
    )
    names = ["base", "mean", "posterior", *(["mean-pruned", "posterior-pruned"] if ratio else [])]
    rows, samples = choose_rows(names, tau, ratio), run["samples"]
    temperature, threshold = _number("temperature", recommended.get("temperature", 1.0)), threshold_of(recommended)
    if temperature != 1 or threshold is not None:
        rows.append(Variant("recommended", tau, ratio, temperature=temperature))
    loading["begin"] = lambda doing: begin(doing, 0)
    evaluation = Evaluation(adapter, data, rows=rows, ood=ood, calibrate=calibrate, **loading)
    rows = evaluation.meaningful(rows, notify)
    if calibrate is not None:
        scaled = calibrated_rows(rows)
        told = begin("fitting temperatures", count_passes(scaled, samples) * len(evaluation.held_out))
        rows += evaluation.temperatures(scaled, **run, progress=told, notify=notify)
    told = begin("evaluating", count_passes(rows, samples) * len(evaluation.items))
    scores = evaluation.run(rows, **run, progress=told, notify=notify)
    begin("bootstrap", 0)
    found = summarize(evaluation, rows, scores, samples)
    if threshold is not None and evaluation.task != "generate":
        place = [row.name for row in rows].index("recommended")
        found = with_answered(found, "recommended", evaluation.files, scores[place], threshold)
    document = {
        "rows": found,
        "ood": detect(evaluation, rows, scores, samples),
        "verdicts": verdicts(found),
        "task": evaluation.task,
        "choices": list(evaluation.choices),
        "samples": samples,
        "tau": "inf" if math.isinf(tau) else tau,
        "prune_ratio": ratio,
        "seed": run["seed"],
    }
    return Measured(document, list(describe(evaluation, rows, scores)), recommended)


def threshold_of(recommended: Mapping[str, Any]) -> float | None:
    """Return the confidence from which on to answer, where one was promised for the probability of an answer."""
    threshold = recommended.get("threshold")
    if threshold is None or recommended.get("score", "probability") != "probability":
        return None
    return _number("threshold", threshold)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise IVONError(f"{param_ref('recommended')}: {name} is {value!r}, which is no number") from None
