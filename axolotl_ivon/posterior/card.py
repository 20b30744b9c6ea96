"""The model card of an adapter: what README.md says of its posterior, kept true when the posterior changes.

What is written here lies between marks (Markdown comments), and only that is ever replaced; the rest of the card is
PEFT's, the Trainer's and the user's, but for three statements of the Trainer that IVON-LoRA makes wrong. The metadata
at the top gets three tags; `inspect.card` adds what was measured.
It is edited as plain YAML: `huggingface_hub.ModelCard` drops empty fields and all models of `model-index` but one, and
takes longer to import than saving a posterior does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..errors import IVONError, one_line, printable
from ..storage.atomic import new_file
from ..storage.format import RECOMMENDED_FILE, SIGMA_FILE
from .adapter import TRAINING_TAU, Adapter, posterior_number
from .recommended import recommended_in, tau_on_top
from .tensors import head_size

if TYPE_CHECKING:
    from ..records.recommendation import Recommendation

CARD_FILE = "README.md"
RESULTS_FOLDER = ".eval_results"
TAGS = ("ivon", "bayesian", "uncertainty")
MEASURED_BY = "ivon-post eval"  # the name of a result in the metadata has it, and only such results are replaced

_LARGEST = 2**22  # characters; a card that is larger is left alone
# The metadata at the top, as the Hub finds it.
_FRONT = re.compile(r"\A(\s*---[\r\n]+)([\s\S]*?)([\r\n]+---(?:\r\n|\n|\Z))")
_SECTION = re.compile(r"<!-- ivon: begin[^>]*-->[\s\S]*?<!-- ivon: end -->\n?")
_RESULTS = re.compile(r"<!-- ivon results: begin ([^>]*)-->[\s\S]*?<!-- ivon results: end -->\n?")
# Lines of the card that transformers' Trainer writes.
_TRAINER_RATE = re.compile(r"^(- learning_rate: )([\d.e+-]+)$", re.M)
_TRAINER_OPTIMIZER = re.compile(r"^(- optimizer: )Use (?:.* the args are:\n)?.*$", re.M)
# Field of the header -> what the card calls it.
HEADER_LABELS = {
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
_USE = """\
`adapter_model.safetensors` holds the mean, and loads as any PEFT adapter:

```python
from peft import {auto}

model = {auto}.from_pretrained("."{labels})  # in this folder; elsewhere its path or Hub id
```

{prediction}With axolotl-ivon, draws from the posterior, whose disagreement is what the model does not know:

```python
from axolotl_ivon import Posterior

posterior = Posterior.from_pretrained(".")
weights = posterior.sample(seed=0)  # one draw, under PEFT's names
```

- `ivon-post eval . --data test.jsonl` says what averaging draws changes on your data.
- `ivon-post sample . -n 8 --serve vllm -o ../ensemble` writes eight complete PEFT adapters and serve.sh.
"""
_AUTO = {"SEQ_CLS": "AutoPeftModelForSequenceClassification"}
_PREDICT = """\
{sentences}

```python
import torch

{code}
```

`eval`, `predict`, `generate`, `serve` and `merge` of `ivon-post` take it from `{file}`.

"""
_AT_THE_MEAN = """\
with torch.no_grad():  # inputs: what the tokenizer returns
    probabilities = (model(**inputs).logits{divided}).softmax(-1)"""
_BY_DRAWS = """\
from axolotl_ivon import Posterior, draws

posterior = Posterior.from_pretrained("."){changed}
with torch.no_grad(), draws(posterior, model, n={samples}) as members:  # inputs: what the tokenizer returns
    average = torch.stack([model(**inputs).logits.softmax(-1) for _ in members]).mean(0)
probabilities = (average.log(){divided}).softmax(-1)"""


def escape(value: object) -> str:
    """Return one line that Markdown shows as it is, also within a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~])", r"\\\1", printable(str(value)))


def header_value(value: str) -> str:
    """Return a value of the header; a number with few digits."""
    try:
        number = float(value)
    except ValueError:
        return value
    return f"{number:,.6g}" if number >= 1000 else f"{number:g}"


def _prediction(recommended: Recommendation, header: Mapping[str, str]) -> str:
    """Return what to predict with, and the code that does."""
    tau, ratio, samples = recommended.tau, recommended.ratio, recommended.samples or 10
    divided = "" if recommended.temperature == 1 else f" / {recommended.temperature:.4g}"
    code = _AT_THE_MEAN.format(divided=divided)
    if ratio or math.isfinite(tau):
        changed = f".prune({ratio:g})" if ratio else ""
        if math.isfinite(tau):  # the adapter may have been tempered since
            changed += f".temper({tau_on_top(recommended, header, tau):g})"
        else:
            changed, samples = f'{changed}.temper(float("inf"))', 1
        code = _BY_DRAWS.format(changed=changed, samples=samples, divided=divided)
    sentences = "\n\n".join(map(escape, recommended.sentences()))
    return _PREDICT.format(sentences=sentences, code=code, file=RECOMMENDED_FILE)


def section(
    header: Mapping[str, str],
    config: Mapping[str, Any],
    recommended: Recommendation | None = None,
    labels: int | None = None,
) -> str:
    """Return the card's section on a posterior.

    Args:
        header: of ivon_sigma.safetensors.
        config: adapter_config.json.
        recommended: what to predict with, where that was found out.
        labels: how many the adapter's classification head has, if it has one.
    """
    if "fit_method" in header:
        origin = "whose σ axolotl-ivon fitted after training, around the trained weights"
    else:
        origin = "trained with IVON-LoRA ([arXiv 2506.14280](https://arxiv.org/abs/2506.14280)) by axolotl-ivon"
    task = str(config.get("task_type"))
    rows = [("base model", PurePath(str(config.get("base_model_name_or_path"))).name)]
    rows += [(label, header_value(header[name])) for name, label in HEADER_LABELS.items() if header.get(name)]
    lines = [
        "<!-- ivon: begin; `ivon-post card` replaces what lies between these marks -->",
        "## Posterior",
        "",
        f"This adapter is a Gaussian posterior over its weights, {origin}. Beside the mean, "
        f"`{SIGMA_FILE}` holds the standard deviation σ of every weight, in float32 under the same names.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {escape(value)} |" for label, value in rows),
        "",
        _USE.format(
            auto=_AUTO.get(task, "AutoPeftModelForCausalLM"),
            labels=f", num_labels={labels}" if labels and task in _AUTO else "",
            prediction=_prediction(recommended, header) if recommended else "",
        ),
        "### Limits",
        "",
        *(f"- {limit}" for limit in _limits(header)),
        "<!-- ivon: end -->",
        "",
    ]
    return "\n".join(lines)


def _limits(header: Mapping[str, str]) -> list[str]:
    limits = [
        "σ is one width for each weight around one solution, independent of the others. It does not hold the doubt "
        "about the base model, nor about solutions far away.",
        "Probabilities are calibrated as well as was measured, on data like those of the measurement.",
    ]
    with contextlib.suppress(KeyError, ValueError, ZeroDivisionError):
        steps, memory = float(header["steps"]), 1 / (1 - float(header["beta2"]))
        if "fit_method" not in header and steps < memory:
            limits.append(
                f"β2 remembers {memory:,.0f} steps and the run had {steps:,.0f}: σ is still near its start, 1/√(λ·h0)."
            )
    if header.get("combined"):
        limits.append("It was made of several posteriors; the rest of this card is that of the first.")
    elif posterior_number(header, "pruned_ratio") or posterior_number(header, "tau") != posterior_number(
        header, TRAINING_TAU
    ):
        limits.append("It was changed after training; the rest of this card describes the training.")
    return limits


def _identity(header: Mapping[str, str]) -> str:
    """Return a fingerprint of the posterior, to which results belong."""
    values = {name: header.get(name) for name in ("mean_sha256", *HEADER_LABELS)}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def with_posterior(
    text: str,
    header: Mapping[str, str],
    config: Mapping[str, Any],
    recommended: Recommendation | None = None,
    labels: int | None = None,
) -> str:
    """Return the card `text` with the posterior's section and tags; results of another posterior go.

    Everything else stays as it is; a second time changes nothing.

    Raises:
        IVONError: the metadata at the top of the card cannot be read, or a mark is missing.
    """
    _check_marks(text)
    results = _RESULTS.search(text)
    if results and results[1].strip() != _identity(header):
        text = _edit_metadata(_RESULTS.sub("", text), lambda data: _put_results(data, []))
    new = section(header, config, recommended, labels)
    return _edit_metadata(_put_marked(_corrected(text, header, config), _SECTION, new), _add_tags)


def _check_marks(text: str) -> None:
    """Raise IVONError if something marked has no end: up to a later one, the user's own words would be replaced."""
    for name in ("ivon", "ivon results"):
        begin, end = f"<!-- {name}: begin", f"<!-- {name}: end -->"
        if not all(end in part for part in text.split(begin)[1:]):
            raise IVONError(
                f"{CARD_FILE}: {begin} … --> has no {end} after it; put that line back, or remove the mark that begins"
            )


def _corrected(text: str, header: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Return the Trainer's card with the base model, optimizer and learning rate that the run had.

    The Trainer knows no base model in a folder, no optimizer but its own, and α alone of the learning rate.
    """
    base = PurePath(str(config.get("base_model_name_or_path"))).name
    text = text.replace("This model was trained from scratch on ", f"This model is a fine-tuned version of {base} on ")
    if "preset" not in header or "fit_method" in header:
        return text
    given = header.get("learning_rate") or ("" if header["preset"] == "paper" else "not set")
    text = _TRAINER_RATE.sub(
        lambda line: f"{line[1]}{given} (IVON's α: {header_value(line[2])})" if given else line[0], text
    )
    settings = ", ".join(f"{name} {header[name]}" for name in ("beta1", "beta2", "clip", "h0") if name in header)
    return _TRAINER_OPTIMIZER.sub(lambda line: f"{line[1]}IVON-LoRA (axolotl-ivon) with {settings}", text)


def with_results(text: str, header: Mapping[str, str], lines: Sequence[str], entries: Sequence[Any], name: str) -> str:
    """Return the card `text` with what was measured of the posterior, in place of what was there.

    Args:
        lines: Markdown.
        entries: results for `model-index`; those that others wrote stay.
        name: the model's name there, where it has none.

    Raises:
        IVONError: the metadata at the top of the card cannot be read.
    """
    begin, end = f"<!-- ivon results: begin {_identity(header)} -->", "<!-- ivon results: end -->"
    text = _put_marked(text, _RESULTS, "\n".join([begin, "## Measured", "", *lines, end, ""]))
    return _edit_metadata(text, lambda data: _put_results(data, entries, name))


def _put_marked(text: str, marked: re.Pattern[str], new: str) -> str:
    """Put `new` in the place of what is marked, or at the end."""
    if marked.search(text):
        return marked.sub(lambda _: new, text, count=1)
    return f"{text.rstrip()}\n\n{new}"


def _edit_metadata(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Return the card with its metadata changed in place by `change`; it stays byte for byte where they are equal."""
    import yaml

    front = _FRONT.match(text)
    try:
        data = (yaml.safe_load(front[2]) if front else None) or {}
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
    return f"---\n{dumped}---\n{text[front.end() :] if front else text}"


def _add_tags(data: dict[str, Any]) -> None:
    tags = data.get("tags")
    tags = [tags] if isinstance(tags, str) else _list(tags)
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]


def _put_results(data: dict[str, Any], entries: Sequence[Any], name: str = "") -> None:
    """Put `entries` into the model index in place of those that were written here before; others' stay."""
    index = _list(data.get("model-index"))
    if not index and not entries:
        return
    first = _mapping(index[0]) if index else {"name": name}

    def ours(result: Any) -> bool:
        metrics = _list(_mapping(result).get("metrics"))
        return bool(metrics) and all(f"({MEASURED_BY})" in str(_mapping(metric).get("name")) for metric in metrics)

    kept = [result for result in _list(first.get("results")) if not ours(result)]
    data["model-index"] = [{**first, "results": [*kept, *entries]}, *index[1:]]


def _forget_results(data: dict[str, Any]) -> None:
    if any(_mapping(model).get("results") for model in _list(data.get("model-index"))):
        del data["model-index"]


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return what YAML holds where a mapping belongs; an empty one if it holds something else."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_card(folder: Path) -> str:
    """Return the card in `folder`, or an empty one.

    Raises:
        IVONError: it is no text, or cannot be read.
    """
    path = folder / CARD_FILE
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise IVONError(f"{path} cannot be read ({one_line(error)})") from None
    if len(text) > _LARGEST:
        raise IVONError(f"{path} is too large for a model card")
    return text


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, unless it holds the text already."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_bytes().decode() == text:
            return
    with new_file(path) as temporary:
        temporary.write_bytes(text.encode())


def update_card(folder: Path) -> None:
    """Describe the posterior that lies in an adapter's folder in its card; without σ the card stays as it is.

    Raises:
        IVONError: the card or the adapter cannot be read, or the card cannot be written.
    """
    if (folder / SIGMA_FILE).is_file():
        adapter = Adapter(folder)
        record, labels = recommended_in(adapter), head_size(adapter.mean.specs)
        text = with_posterior(read_card(folder), adapter.metadata, adapter.config, record, labels)
        write_text(folder / CARD_FILE, text)


def keep_true(
    folder: Path, header: Mapping[str, str], config: Mapping[str, Any], labels: int | None, changed: bool
) -> None:
    """Remove statements from the card in `folder`, a copy of another adapter's, that do not apply here.

    `changed`: the mean is another one, so no result in the metadata applies.

    Raises:
        IVONError: the card cannot be read or written.
    """
    text = read_card(folder)
    if _SECTION.search(text):
        text = with_posterior(text, header, config, labels=labels)
    if text:
        write_text(folder / CARD_FILE, _edit_metadata(text, _forget_results) if changed else text)


def remove_old_results(folder: Path) -> None:
    """Remove our files in `.eval_results` where the card has no results any more."""
    files = sorted((folder / RESULTS_FOLDER).glob("ivon-*.yaml"))
    if files and not _RESULTS.search(read_card(folder)):
        for path in files:
            path.unlink(missing_ok=True)
