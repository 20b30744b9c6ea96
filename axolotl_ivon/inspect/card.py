"""What was measured of an adapter, in its model card and in `.eval_results`.

The metadata get `model-index`, the form that the Hub reads for any data set. `.eval_results/*.yaml`
(https://huggingface.co/docs/hub/eval-results) is its successor for the Hub's benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..errors import IVONError, param_ref
from ..metrics.verdict import METRICS
from ..posterior.adapter import Adapter
from ..posterior.card import (
    CARD_FILE,
    MEASURED_BY,
    RESULTS_FOLDER,
    escape,
    read_card,
    with_posterior,
    with_results,
    write_text,
)
from ..posterior.recommended import recommended_from, recommended_in
from ..posterior.tensors import head_size
from ..records.evaluation import EvaluationRecord, VariantResult
from ..storage.atomic import output_folder
from ..storage.format import SIGMA_FILE, file_names

_COLUMNS = ("accuracy", "ece", "nll", "perplexity", "brier", "auroc", "aurc", "cov_at_5risk")
_TASKS = {"choice": "multiple-choice", "classify": "text-classification", "generate": "text-generation"}


def add_results(
    folder: Path, results: Path | None = None, recommended: Path | bool = True, datasets: Sequence[str] = ()
) -> list[Path]:
    """Write what was measured into the card of an adapter's folder, and into `.eval_results`.

    Args:
        results: what `ivon-post eval` printed as JSON.
        recommended: a recommended.json; True is the folder's own, if it has one, and False none.
        datasets: for the data files of `results`, in their order, `owner/name` or `owner/name/task` of the Hub's
            benchmark; without one, an entry has the file's name, and the Hub lists it in no leaderboard.

    Returns:
        The files with the results, the card first.

    Raises:
        IVONError: a file cannot be read, is no such file, or is another adapter's.
    """
    if not folder.is_dir():
        raise IVONError(f"{folder}: no such folder here; a card is edited in a folder (`hf download` fetches one)")
    adapter = Adapter(folder)
    if adapter.sigma is None:
        raise IVONError(
            f"{folder} has no {SIGMA_FILE}, so no posterior to describe in its card; `ivon-post fit` makes one"
        )
    adapter.check_pair()
    header = adapter.metadata
    record = recommended_in(adapter) if recommended is True else None
    if isinstance(recommended, Path):
        record = recommended_from(recommended, adapter)
    text = with_posterior(read_card(folder), header, adapter.config, record, head_size(adapter.mean.specs))
    files = [folder / CARD_FILE]
    if results is None:
        write_text(files[0], text)
        return files
    import yaml

    evaluation = EvaluationRecord.load(results, "results", header)
    ids = _dataset_ids(evaluation.files, datasets)
    text = with_results(text, header, _table(evaluation), _model_index(evaluation, ids), folder.resolve().name)
    output_folder(folder / RESULTS_FOLDER)
    write_text(files[0], text)
    for variant, values in _eval_results(evaluation, ids).items():
        files.append(folder / RESULTS_FOLDER / f"ivon-{variant}.yaml")
        write_text(files[-1], yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    for path in set((folder / RESULTS_FOLDER).glob("ivon-*.yaml")) - set(files):
        path.unlink()
    return files


def _dataset_ids(files: Sequence[str], datasets: Sequence[str]) -> dict[str, str]:
    """Return the Hub's data set of each file, or a name of its own."""
    named = param_ref("datasets")
    if datasets and len(datasets) != len(files):
        raise IVONError(
            f"{named}: {len(datasets)} for {len(files)} data files ({', '.join(files)}); give one for each, in order"
        )
    for given in datasets:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", given):
            raise IVONError(f"{named} {given}: give owner/name, or owner/name/task")
    return dict(zip(files, datasets or _own_ids(file_names(files).values()), strict=True))


def _own_ids(names: Collection[str]) -> list[str]:
    """Return different ids for files with these names, without a slash: that would be a data set of the Hub."""
    stems = [name.removesuffix(PurePath(name).suffix) for name in names]
    return [each.replace("/", "--") for each in (stems if len({*stems}) == len(names) else names)]


def metrics_table(evaluation: EvaluationRecord) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the headings of what was measured; and for every row its share of answers, and its figures with errors."""
    columns = [
        metric
        for metric in _COLUMNS
        if any(row.value(metric) is not None for row in evaluation.rows)
        and (metric != "perplexity" or evaluation.task == "generate")
    ]
    lines = []
    for row in evaluation.rows:
        coverage = f" ({100 * row.coverage:.1f} %)" if row.coverage is not None else ""
        lines.append((coverage, [METRICS[name].write(row.value(name), row.se.value(name)) for name in columns]))
    return [METRICS[name].heading() for name in columns], lines


def _table(evaluation: EvaluationRecord) -> list[str]:
    heads, cells = metrics_table(evaluation)
    lines = [
        f"`{MEASURED_BY}`, {escape(evaluation.task)}, {evaluation.draws}, seed {evaluation.seed}; "
        "± is a bootstrap standard error.",
        "",
        "| data | |" + "".join(f" {heading} |" for heading in heads),
        "|---|---|" + "---:|" * len(heads),
    ]
    names, before = file_names(evaluation.files), None
    for row, (coverage, figures) in zip(evaluation.rows, cells, strict=True):
        data = f"{escape(names[row.data])} ({row.examples})"
        lines.append(f"| {data if data != before else ''} | {escape(row.name)}{coverage} | {' | '.join(figures)} |")
        before = data
    return lines


def _of_this_model(evaluation: EvaluationRecord) -> list[VariantResult]:
    """Return the rows that are neither another model's nor of a part of the data."""
    return [row for row in evaluation.rows if row.name != "base" and row.coverage is None]


def _setup(row: VariantResult, evaluation: EvaluationRecord) -> str:
    """Return how the predictions of a row were made."""
    setup = row.name
    if row.name.startswith("posterior"):
        setup += f": average over {row.samples} draws at τ {evaluation.tau:g}"
    return setup + (f", pruned {evaluation.prune_ratio}" if "pruned" in row.name else "")


def _model_index(evaluation: EvaluationRecord, ids: Mapping[str, str]) -> list[Any]:
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    names = file_names(evaluation.files)
    results = [
        EvalResult(
            task_type=_TASKS.get(evaluation.task, "text-generation"),
            dataset_type=ids[row.data],
            dataset_name=names[row.data],
            metric_type=metric,
            metric_value=value,
            metric_name=f"{metric}, {_setup(row, evaluation)} ({MEASURED_BY})",
        )
        for row in _of_this_model(evaluation)
        for metric in ("accuracy", "ece", "nll", "brier")
        if (value := row.value(metric)) is not None
    ]
    return eval_results_to_model_index("", results)[0]["results"] if results else []


def _eval_results(evaluation: EvaluationRecord, ids: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return for every variant what its file in `.eval_results` holds: its accuracy on each data file."""
    files: dict[str, list[dict[str, Any]]] = {}
    for row in _of_this_model(evaluation):
        if row.accuracy is None:
            continue
        owner, *rest = ids[row.data].split("/")
        entry = {
            "dataset": {"id": "/".join([owner, *rest[:1]]), "task_id": rest[1] if len(rest) > 1 else "default"},
            "value": round(100 * row.accuracy, 2),
            "notes": f"accuracy in %, {_setup(row, evaluation)}",
        }
        files.setdefault(re.sub(r"[^\w.-]+", "-", row.name), []).append(entry)
    return files
