"""The model card of an adapter: what README.md says of its posterior, and of what was measured with it.

What is written here lies between marks (Markdown comments), and only that is ever replaced; the rest of the card is
PEFT's, the Trainer's and the user's. The metadata at the top gets three tags, and `model-index` with the results, the
form that the Hub reads for any data set. `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results) is its
successor for the Hub's benchmarks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..errors import IVONError, one_line, param_ref, printable
from ..storage.atomic import new_file, output_folder
from ..storage.format import CONFIG_FILE, MEAN_FILE, SIGMA_FILE, read_json
from ..storage.tensorfile import TensorFile
from .adapter import Adapter
from .tensors import fingerprint

CARD_FILE = "README.md"
RESULTS_FOLDER = ".eval_results"
TAGS = ("ivon", "bayesian", "uncertainty")

_LARGEST = 2**22  # characters; a card that is larger is left alone
_BY = "ivon-post eval"
# As the Hub finds the metadata.
_FRONT = re.compile(r"\A(\s*---[\r\n]+)([\s\S]*?)([\r\n]+---(?:\r\n|\n|\Z))")
_SECTION = re.compile(r"<!-- ivon: begin[^>]*-->[\s\S]*?<!-- ivon: end -->\n?")
_RESULTS = re.compile(r"<!-- ivon results: begin ([^>]*)-->[\s\S]*?<!-- ivon results: end -->\n?")
# Fact of the header -> what the card calls it.
FACTS = {
    "ess": "effective sample size λ",
    "gamma": "γ, of λ = γ·√N",
    "train_size": "training examples N",
    "h0": "initial Hessian h0",
    "beta1": "β1",
    "beta2": "β2",
    "clip": "clip ξ",
    "prior": "prior",
    "prior_strength": "strength of the prior",
    "chain_train_size": "training examples since the first posterior",
    "preset": "preset",
    "fit_method": "σ fitted afterwards, by",
    "fit_data": "σ fitted on",
    "steps": "steps",
    "tau": "temperature τ, by which σ is divided as √τ",
    "pruned_ratio": "share of weights pruned",
    "combined": "combined",
}
# Metric of a row -> its heading, and the factor and digits with which it is written.
COLUMNS: dict[str, tuple[str, int, int]] = {
    "accuracy": ("accuracy, %", 100, 1),
    "ece": ("ECE, %", 100, 1),
    "nll": ("NLL", 1, 3),
    "perplexity": ("perplexity", 1, 3),
    "brier": ("Brier", 1, 3),
    "auroc": ("AUROC", 1, 3),
    "aurc": ("AURC", 1, 3),
    "cov_at_5risk": ("coverage at 5 % risk, %", 100, 1),
}
_TASKS = {"choice": "multiple-choice", "classify": "text-classification", "generate": "text-generation"}
_USE = """\
`adapter_model.safetensors` holds the mean, and loads as any PEFT adapter:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("ADAPTER")  # this folder, or its Hub id
```

With `pip install axolotl-ivon`, draws from the posterior, whose disagreement is what the model does not know:

```python
from axolotl_ivon import Posterior

posterior = Posterior.from_pretrained("ADAPTER")
weights = posterior.sample(seed=0)  # one draw, under PEFT's names
```

- `ivon-post eval ADAPTER --data test.jsonl` says what averaging draws changes on your data.
- `ivon-post sample -n 8 ADAPTER --serve vllm -o ensemble/` writes eight complete PEFT adapters and serve.sh.
"""


def _cell(value: object) -> str:
    """Return one line that Markdown shows as it is, also within a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~])", r"\\\1", printable(str(value)))


def fact(value: str, escape: bool = True) -> str:
    """Return a fact of the header, a number with few digits; for Markdown, or else as it is."""
    try:
        number = float(value)
    except ValueError:
        return _cell(value) if escape else value
    return f"{number:,.6g}" if number >= 1000 else f"{number:g}"


def section(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Return what the card says of a posterior, from the header of its σ and its adapter_config.json."""
    rows = [(told, fact(metadata[name])) for name, told in FACTS.items() if metadata.get(name)]
    rows = [("base model", _cell(PurePath(str(config.get("base_model_name_or_path"))).name)), *rows]
    lines = [
        "<!-- ivon: begin; `ivon-post card` replaces what lies between these marks -->",
        "## Posterior",
        "",
        f"This adapter is a Gaussian posterior over its weights, {_origin(metadata)}. Beside the mean, "
        f"`{SIGMA_FILE}` holds the standard deviation σ of every weight, in float32 under the same names.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {told} | {value} |" for told, value in rows),
        "",
        _USE,
        "### Limits",
        "",
        *(f"- {limit}" for limit in _limits(metadata)),
        "<!-- ivon: end -->",
        "",
    ]
    return "\n".join(lines)


def _origin(metadata: Mapping[str, str]) -> str:
    """Return how mean and σ were found."""
    if "fit_method" in metadata:
        return "whose σ axolotl-ivon fitted after training, around weights that were there"
    return "trained with IVON-LoRA ([arXiv 2506.14280](https://arxiv.org/abs/2506.14280)) by axolotl-ivon"


def _limits(metadata: Mapping[str, str]) -> list[str]:
    limits = [
        "σ is one width for each weight around one solution, independent of the others: not the doubt about the base "
        "model, nor about solutions far away.",
        "Probabilities are as well calibrated as measured, on data like that on which they were measured.",
    ]
    with contextlib.suppress(KeyError, ValueError, ZeroDivisionError):
        steps, memory = float(metadata["steps"]), 1 / (1 - float(metadata["beta2"]))
        if "fit_method" not in metadata and steps < memory:
            limits.append(
                f"β2 remembers {memory:,.0f} steps and the run had {steps:,.0f}: σ is still near where it began, "
                "1/√(λ·h0)."
            )
    if metadata.get("combined"):
        limits.append("It was made of several posteriors; the rest of this card is that of the first.")
    elif float(metadata.get("pruned_ratio") or 0) or float(metadata.get("tau") or 1) != 1:
        limits.append("It was changed after training; the rest of this card tells of the training.")
    return limits


def _identity(metadata: Mapping[str, str]) -> str:
    """Return what tells a posterior from others: results belong to it."""
    facts = {name: metadata.get(name) for name in ("mean_sha256", *FACTS)}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def describe(text: str, metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Return the card `text` with the posterior's section and tags; results of another posterior go.

    Everything else stays as it is; a second time changes nothing.

    Raises:
        IVONError: the metadata at the top of the card cannot be read.
    """
    found = _RESULTS.search(text)
    if found and found[1].strip() != _identity(metadata):
        text = _edit_metadata(_RESULTS.sub("", text), lambda data: _put_results(data, []))
    return _edit_metadata(_replace(text, _SECTION, section(metadata, config)), _add_tags)


def _replace(text: str, marked: re.Pattern[str], new: str) -> str:
    """Put `new` in the place of what is marked, or at the end."""
    if marked.search(text):
        return marked.sub(lambda _: new, text, count=1)
    return f"{text.rstrip()}\n\n{new}"


def _edit_metadata(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    import yaml

    found = _FRONT.match(text)
    try:
        data = (yaml.safe_load(found[2]) if found else None) or {}
        before = json.dumps(data, default=str)
        if not isinstance(data, dict):
            raise ValueError("it is no mapping")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise IVONError(
            f"{CARD_FILE}: its metadata, between the lines ---, cannot be read ({one_line(error)})"
        ) from None
    change(data)
    if json.dumps(data, default=str) == before:
        return text
    dumped = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{dumped}---\n{text[found.end() :] if found else text}"


def _add_tags(data: dict[str, Any]) -> None:
    tags = data.get("tags")
    tags = [tags] if isinstance(tags, str) else _list(tags)
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]


def _forget_results(data: dict[str, Any]) -> None:
    if any(_mapping(model).get("results") for model in _list(data.get("model-index"))):
        del data["model-index"]


def read_card(folder: Path) -> str:
    """Return the card in `folder`, or an empty one.

    Raises:
        IVONError: it is no text, or cannot be read.
    """
    try:
        with (folder / CARD_FILE).open(encoding="utf-8", newline="") as file:
            text = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise IVONError(f"{folder / CARD_FILE} cannot be read ({one_line(error)})") from None
    if len(text) > _LARGEST:
        raise IVONError(f"{folder / CARD_FILE} is too large for a model card")
    return text


def _write(path: Path, text: str) -> None:
    """Write a file at once, unless it holds that already."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_bytes().decode() == text:
            return
    with new_file(path) as temporary:
        temporary.write_bytes(text.encode())


def update_card(folder: Path) -> None:
    """Let the card in an adapter's folder tell of the posterior that lies there; without σ it stays as it is.

    Raises:
        IVONError: the card or the adapter cannot be read, or the card cannot be written.
    """
    if not (folder / SIGMA_FILE).is_file():
        return
    metadata, config = TensorFile(folder / SIGMA_FILE).metadata, read_json(folder / CONFIG_FILE)
    _write(folder / CARD_FILE, describe(read_card(folder), metadata, config))


def keep_true(folder: Path, metadata: Mapping[str, str], config: Mapping[str, Any], changed: bool) -> None:
    """Let a card that was copied to `folder` from another adapter's say nothing that does not hold here.

    `changed` says that the mean is another one, to which no result in the metadata applies.

    Raises:
        IVONError: the card cannot be read or written.
    """
    text = read_card(folder)
    if _SECTION.search(text):
        text = describe(text, metadata, config)
    if text:
        _write(folder / CARD_FILE, _edit_metadata(text, _forget_results) if changed else text)


def remove_old_results(folder: Path) -> None:
    """Remove the files of `.eval_results` that were written here, where the card has no results any more."""
    files = sorted((folder / RESULTS_FOLDER).glob("ivon-*.yaml"))
    if files and not _RESULTS.search(read_card(folder)):
        for path in files:
            path.unlink(missing_ok=True)


# Results


def add_results(
    folder: Path,
    results: Path | None = None,
    recommended: Path | None = None,
    datasets: Sequence[str] = (),
) -> list[Path]:
    """Write what was measured into the card of an adapter's folder, and into `.eval_results`.

    Args:
        results: what `ivon-post eval` printed as JSON.
        recommended: recommended.json of `ivon-post sweep`.
        datasets: for the data files of `results`, in their order, `owner/name` or `owner/name/task` of the Hub's
            benchmark; without one, an entry has the file's name, and the Hub lists it in no leaderboard.

    Returns:
        The files that tell of it, the card first.

    Raises:
        IVONError: a file cannot be read, is no such file, or is another adapter's.
    """
    adapter = _posterior(folder)
    text = describe(read_card(folder), *adapter)
    written: dict[str, list[dict[str, Any]]] = {}
    parts: list[str] = []
    entries: list[Any] = []
    if results is not None:
        facts = read_of_adapter(results, "results", "rows", "`ivon-post eval --json`", adapter[0])
        rows = _rows(results, facts)
        ids = _dataset_ids(rows, datasets)
        parts += _table(rows, facts)
        entries = _model_index(rows, facts, ids)
        written = _entries(rows, facts, ids)
    if recommended is not None:
        found = read_of_adapter(recommended, "recommended", "tau", "`ivon-post sweep`", adapter[0])
        parts += ["", *_recommendation(found)]
    if parts:
        begin, end = f"<!-- ivon results: begin {_identity(adapter[0])} -->", "<!-- ivon results: end -->"
        text = _replace(text, _RESULTS, "\n".join([begin, "## Measured", "", *parts, end, ""]))
    if results is not None:
        name = folder.resolve().name
        text = _edit_metadata(text, lambda data: _put_results(data, entries, name))
        output_folder(folder / RESULTS_FOLDER)
    _write(folder / CARD_FILE, text)
    files = [folder / CARD_FILE]
    if results is not None:
        import yaml

        for row, rows_of_file in written.items():
            files.append(folder / RESULTS_FOLDER / f"ivon-{row}.yaml")
            _write(files[-1], yaml.safe_dump(rows_of_file, sort_keys=False, allow_unicode=True))
        for path in set((folder / RESULTS_FOLDER).glob("ivon-*.yaml")) - set(files):
            path.unlink()
    return files


def _posterior(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the header of σ and the configuration of the adapter in `folder`, whose two files belong together."""
    if not folder.is_dir():
        raise IVONError(f"{folder}: no such folder here; a card is edited in a folder (`hf download` fetches one)")
    adapter = Adapter(folder)
    if adapter.sigma is None:
        raise IVONError(f"{folder} has no {SIGMA_FILE}, so there is no posterior to tell of")
    if fingerprint(adapter.mean, adapter.digests()) != adapter.metadata.get("mean_sha256"):
        raise IVONError(f"{folder / SIGMA_FILE} belongs to another {MEAN_FILE} (mean_sha256 differs)")
    return adapter.metadata, adapter.config


def read_of_adapter(path: Path, name: str, key: str, whence: str, metadata: Mapping[str, str]) -> dict[str, Any]:
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


def _rows(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = facts["rows"]
    fine = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not fine or not all({"name", "data", "accuracy"} <= row.keys() for row in rows):
        raise IVONError(f"{param_ref('results')} {path}: its `rows` are not those of `ivon-post eval --json`")
    return rows


def _dataset_ids(rows: Sequence[Mapping[str, Any]], datasets: Sequence[str]) -> dict[str, str]:
    files = list(dict.fromkeys(str(row["data"]) for row in rows))
    named = param_ref("datasets")
    if datasets and len(datasets) != len(files):
        raise IVONError(
            f"{named}: {len(datasets)} for {len(files)} data files ({', '.join(files)}); give one for each, in order"
        )
    for given in datasets:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", given):
            raise IVONError(f"{named} {given}: give owner/name, or owner/name/task")
    return dict(zip(files, datasets or [PurePath(file).stem for file in files], strict=True))


def measured(value: Any, error: Any, factor: int, digits: int) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    told = f"{factor * value:.{digits}f}"
    return f"{told} ± {factor * error:.{digits}f}" if isinstance(error, (int, float)) else told


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return what a file holds where a JSON object belongs; an empty one if it holds something else."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    task = facts.get("task")
    columns = {
        metric: how
        for metric, how in COLUMNS.items()
        if any(row.get(metric) is not None for row in rows) and (metric != "perplexity" or task == "generate")
    }
    lines = [
        f"`{_BY}`, {_cell(task)}, {_cell(facts.get('samples'))} draws at τ {_cell(facts.get('tau'))}, pruning ratio "
        f"{_cell(facts.get('prune_ratio'))}, seed {_cell(facts.get('seed'))}; ± is a bootstrap standard error.",
        "",
        "| data | |" + "".join(f" {heading} |" for heading, _, _ in columns.values()),
        "|---|---|" + "---:|" * len(columns),
    ]
    before = None
    for row in rows:
        data = f"{_cell(PurePath(str(row['data'])).name)} ({_cell(row.get('examples', '?'))})"
        errors = _mapping(row.get("se"))
        cells = [measured(row.get(m), errors.get(m), factor, digits) for m, (_, factor, digits) in columns.items()]
        name = _cell(row["name"])
        if isinstance(row.get("coverage"), float):
            name += f" ({100 * row['coverage']:.1f} %)"
        lines.append(f"| {data if data != before else ''} | {name} | " + " | ".join(cells) + " |")
        before = data
    return lines


def _recommendation(facts: Mapping[str, Any]) -> list[str]:
    files = _list(facts.get("data"))
    where = ", ".join(_cell(PurePath(str(file)).name) for file in files) or "validation data"
    told = _mapping(facts.get("reported_on"))
    errors = _mapping(told.get("se"))
    figures = [
        f"{heading.removesuffix(', %')} {measured(told[metric], errors.get(metric), factor, digits)}"
        f"{' %' * heading.endswith('%')}"
        for metric, (heading, factor, digits) in COLUMNS.items()
        if metric in ("accuracy", "ece", "nll") and metric in told
    ]
    scaled = facts.get("temperature", 1)
    lines = [
        f"Recommended by `ivon-post sweep`, by {_cell(facts.get('objective'))} on {where}: "
        f"τ {_cell(facts.get('tau'))}, pruning ratio {_cell(facts.get('ratio'))}"
        + (f", the output at temperature {measured(scaled, None, 1, 3)}" if scaled != 1 else "")
        + (f"; on examples that had no part in the choice {', '.join(figures)}." if figures else "."),
    ]
    if _mapping(facts.get("verdict")).get("text"):
        lines[0] += f" Why: {_cell(facts['verdict']['text'])}."
    if facts.get("threshold") is not None and facts.get("score", "probability") == "probability":
        lines += [
            "",
            f"Answer where the confidence is at least {measured(facts['threshold'], None, 1, 3)}, and hand over "
            f"otherwise: then at most {measured(facts.get('risk'), None, 100, 1)} % of the answers are wrong, "
            f"promised with confidence {measured(facts.get('confidence'), None, 100, 0)} % for data like that; it "
            f"answers {measured(facts.get('coverage'), None, 100, 1)} %.",
        ]
    return lines


def _setup(row: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return how the predictions of a row were made."""
    name = str(row["name"])
    told = [name]
    if name.startswith("posterior"):
        told = [f"{name}: average over {row.get('samples')} draws at τ {facts.get('tau')}"]
    if "pruned" in name:
        told.append(f"pruned {facts.get('prune_ratio')}")
    return ", ".join(told)


def _model_index(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], ids: Mapping[str, str]) -> list[Any]:
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    task = str(facts.get("task"))
    found = [
        EvalResult(
            task_type=_TASKS.get(task, "text-generation"),
            dataset_type=ids[str(row["data"])],
            dataset_name=PurePath(str(row["data"])).name,
            metric_type=metric,
            metric_value=row[metric],
            metric_name=f"{metric}, {_setup(row, facts)} ({_BY})",
        )
        for row in rows
        if row["name"] != "base" and "coverage" not in row  # not of a part, nor of another model
        for metric in ("accuracy", "ece", "nll", "brier")
        if isinstance(row.get(metric), (int, float))
    ]
    return eval_results_to_model_index("", found)[0]["results"] if found else []


def _put_results(data: dict[str, Any], entries: list[Any], name: str = "") -> None:
    """Put `entries` into the model index in place of those that were written here before; others' stay."""
    index = _list(data.get("model-index"))
    if not index and not entries:
        return
    first = _mapping(index[0]) if index else {"name": name}

    def ours(result: Any) -> bool:
        metrics = _list(_mapping(result).get("metrics"))
        return bool(metrics) and all(f"({_BY})" in str(_mapping(metric).get("name")) for metric in metrics)

    kept = [result for result in _list(first.get("results")) if not ours(result)]
    data["model-index"] = [{**first, "results": [*kept, *entries]}, *index[1:]]


def _entries(
    rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], ids: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return for every row what its file in `.eval_results` holds: its accuracy on each data file."""
    files: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["name"] == "base" or "coverage" in row or not isinstance(row["accuracy"], (int, float)):
            continue
        owner, *rest = ids[str(row["data"])].split("/")
        dataset = "/".join([owner, *rest[:1]])
        entry = {
            "dataset": {"id": dataset, "task_id": rest[1] if len(rest) > 1 else "default"},
            "value": round(100 * row["accuracy"], 2),
            "notes": f"accuracy in %, {_setup(row, facts)}",
        }
        files.setdefault(re.sub(r"[^\w.-]+", "-", str(row["name"])), []).append(entry)
    return files
