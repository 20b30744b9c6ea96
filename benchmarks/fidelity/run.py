"""The plan of the runs, their results, and the processes that work the plan off."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from axolotl_ivon.settings.presets import usual_rate
from axolotl_ivon.storage.atomic import new_file

HERE = Path(__file__).resolve().parent
ENCODER = ("rank", "targets", "dropout", "upper")  # the settings that make the model, but for the seed
# What is said of a method that does not change a run of it.
CHOICES = ("grid", "rows", "shifted_rows", "select", "choose_by")
# Of the models of the suites, what the usual learning rate follows from.
CONFIGS = {
    "SmolLM2-135M-Instruct": SimpleNamespace(model_type="llama", hidden_size=576),
    "Qwen2.5-Coder-0.5B-Instruct": SimpleNamespace(model_type="qwen2", hidden_size=896),
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One trained run and the rows to evaluate of it; each row is (name, data set)."""

    task: str
    method: str
    settings: str  # canonical JSON of everything that decides the outcome: the dataclass stays hashable
    rows: tuple[tuple[str, str], ...]
    members: tuple[str, ...] = ()  # of an ensemble: the other runs

    @property
    def key(self) -> str:
        """Return what identifies the run in files."""
        return run_key(self.settings)


def run_key(settings: str) -> str:
    """Return a short name for canonical settings."""
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def canonical(settings: Mapping[str, Any]) -> str:
    """Return the one JSON text of these settings."""
    return json.dumps(settings, sort_keys=True)


def settings_of(suite: Mapping[str, Any], task: str, method: str, seed: int, **overrides: Any) -> str:
    """Return the canonical settings of one run: those of the suite, the method and the task, and `overrides`."""
    common = {name: suite[name] for name in ("steps", "batch", "max_tokens", *ENCODER)}
    common |= {name: suite[name] for name in ("model", "warmup") if name in suite}
    decisive = ("source", "question", "train", "validation", "pairs", "lettered", "write")
    spec = {name: suite["tasks"][task].get(name) for name in decisive}
    spec = {name: value for name, value in spec.items() if value is not None}
    own = {name: value for name, value in suite["methods"][method].items() if name not in CHOICES}
    return canonical({**common, **own, "task": spec, "seed": seed, **overrides})


# -------------------------------------------------------------------- results


def read_results(path: Path) -> list[Record]:
    """Return the records of a results file, JSON lines, compressed if it is called .gz; none where there is no file."""
    return [json.loads(line) for line in _content(path).splitlines()]


def _content(path: Path) -> bytes:
    content = path.read_bytes() if path.is_file() else b""
    return gzip.decompress(content) if content and path.suffix == ".gz" else content


def append(path: Path, record: Record) -> None:
    """Add a record: the file is written anew and renamed, one process after the other."""
    with path.with_suffix(".lock").open("w") as lock, new_file(path) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = _content(path) + json.dumps(record).encode() + b"\n"
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def missing_rows(job: Job, records: Iterable[Record]) -> list[tuple[str, str]]:
    """Return the rows of a job that no record holds."""
    done = {(r["row"], r["data"]) for r in records if r["run"] == job.key}
    return [row for row in job.rows if row not in done]


# -------------------------------------------------------------------- planning


def plan(suite: Mapping[str, Any], records: list[Record]) -> Iterator[list[Job]]:
    """Yield stages of jobs, most important first; a stage is planned when those before it have run.

    Of each method and task the grid comes first (seed 0, validation data), then all seeds at the value that is best
    there; the ablations follow. `records` grows in between.
    """
    for stage in suite["stages"]:
        if "ablation" in stage:
            yield [job for name in stage["ablation"] for job in ablation_jobs(suite, name, records)]
            continue
        for task in stage["tasks"]:
            yield [job for method in stage["methods"] for job in grid_jobs(suite, task, method)]
        yield [
            job
            for seed in stage["seeds"]
            for task in stage["tasks"]
            for method in stage["methods"]
            for job in seed_jobs(suite, task, method, seed, records)
        ]


def grid_jobs(suite: Mapping[str, Any], task: str, method: str) -> list[Job]:
    """Return the runs among which a method's learning rate is chosen."""
    spec = suite["methods"][method]
    rows = ((spec["select"], "validation"), (spec["select"], "test"))
    [(name, values)] = spec["grid"].items()
    return [Job(task, method, settings_of(suite, task, method, 0, **{name: value}), rows) for value in values]


def chosen(suite: Mapping[str, Any], task: str, method: str, records: list[Record], by: str | float = "nll") -> Any:
    """Return the grid's value with the lowest validation NLL, or highest accuracy; None before the grid has run.

    `by` is "nll" or "accuracy", or the value itself, or "usual": the rate of a run of the preset that gives none.
    """
    if by == "usual":
        epochs = suite["steps"] * suite["batch"] / suite["tasks"][task]["train"]
        return usual_rate(CONFIGS[suite["model"]], epochs, len(suite["targets"]) * suite["upper"])
    if not isinstance(by, str):
        return by
    best: list[tuple[float, float, Any]] = []
    for job, value in zip(grid_jobs(suite, task, method), _grid(suite, method), strict=True):
        found = [r for r in records if r["run"] == job.key and (r["row"], r["data"]) == job.rows[0]]
        if not found:
            return None
        nll, accuracy = found[0]["metrics"]["nll"], found[0]["metrics"]["accuracy"]
        best.append((nll, -accuracy, value) if by == "nll" else (-accuracy, nll, value))
    return min(best)[2]


def _grid(suite: Mapping[str, Any], method: str) -> list[Any]:
    [values] = suite["methods"][method]["grid"].values()
    return values


def seed_jobs(suite: Mapping[str, Any], task: str, method: str, seed: int, records: list[Record]) -> list[Job]:
    """Return the job of one seed at the chosen learning rate, with all of the method's rows."""
    spec = suite["methods"][method]
    [name] = spec["grid"]
    jobs = []
    for by in spec.get("choose_by", ["nll"]):
        value = chosen(suite, task, method, records, by)
        if value is None:
            continue
        rows = [(row, "test") for row in spec["rows"]]
        if suite["tasks"][task].get("shifted"):
            rows += [(row, domain) for row in spec.get("shifted_rows", []) for domain in suite["domains"]]
        settings = settings_of(suite, task, method, seed, **{name: value})
        members = tuple(settings_of(suite, task, method, s, **{name: value}) for s in suite["seeds"])
        # An ensemble can only be evaluated when its last member is trained.
        rows = [row for row in rows if row[0] != "ensemble" or seed == suite["seeds"][-1]]
        jobs.append(Job(task, method, settings, tuple(rows), members))
    return list(dict.fromkeys(jobs))


def ablation_jobs(suite: Mapping[str, Any], name: str, records: list[Record]) -> list[Job]:
    """Return the runs of one ablation: every variant with every seed, at its own rate or the first of the method."""
    spec = suite["ablations"][name]
    method, task = spec["method"], spec["task"]
    [grid_name] = suite["methods"][method]["grid"]
    by = suite["methods"][method].get("choose_by", ["nll"])[0]
    rows = [(row, "test") for row in spec["rows"]]
    rows += [(suite["methods"][method]["select"], "validation")] if spec.get("validate") else []
    jobs = []
    for seed in spec["seeds"]:
        for variant in spec["variants"]:
            value = variant.get(grid_name, chosen(suite, task, method, records, by))
            if value is not None:
                settings = settings_of(suite, task, method, seed, **{**variant, grid_name: value})
                jobs.append(Job(task, method, settings, tuple(rows)))
    return list(dict.fromkeys(jobs))


# -------------------------------------------------------------------- running


@dataclass(frozen=True)
class Places:
    """Where a worker finds and leaves things."""

    work: Path
    bigbench: Path | None
    results: Path
    commit: str
    draws: int
    sizes: str  # JSON: task -> its specification


@cache
def _task(name: str, settings: str, places: Places) -> Any:
    """Read a task; `settings` are those of an encoder, whose frozen layers are applied here, once."""
    from .data import Task, load_task

    encoder = json.loads(settings)
    spec, causal = json.loads(places.sizes)[name], "model" in encoder
    task = load_task(spec, places.work, places.bigbench, encoder["max_tokens"], _folder(encoder, places), causal)
    freeze = _model({**encoder, "seed": 0}, task, places).eval().freeze
    shifted = {domain: freeze(examples) for domain, examples in task.shifted.items()}
    train, validation, test = (freeze(examples) for examples in (task.train, task.validation, task.test))
    return Task(train, validation, test, shifted, task.classes, task.choices)


def _read_task(name: str, settings: Mapping[str, Any], places: Places) -> Any:
    return _task(
        name, canonical({key: settings[key] for key in (*ENCODER, "max_tokens", "model") if key in settings}), places
    )


def _folder(settings: Mapping[str, Any], places: Places) -> Path:
    """Return where the base model is: of the causal suite it is the one that `make demo` prepares."""
    return places.work.parent / settings["model"] if "model" in settings else places.work / "minilm"


def _model(settings: Mapping[str, Any], task: Any, places: Places) -> Any:
    from .causal import Causal
    from .data import Encoder

    shape = (settings["seed"], *(settings[name] for name in ENCODER))
    if "model" in settings:
        return Causal(_folder(settings, places), task.choices, *shape)
    return Encoder(_folder(settings, places), task.classes, *shape)


def trained(task: str, settings_text: str, places: Places) -> tuple[Any, Any, dict[str, float]]:
    """Return (model, posterior, facts) of a run: read from the work folder, or trained and left there."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from .blocks import correlated
    from .methods import TRAINERS, as_posterior

    settings = json.loads(settings_text)
    data = _read_task(task, settings, places)
    model = _model(settings, data, places)
    path = places.work / "runs" / f"{run_key(settings_text)}.safetensors"
    if not path.is_file():
        torch.manual_seed(settings["seed"] + 1000)
        run = TRAINERS[settings["trainer"]](model, data, settings)
        facts = {"train_seconds": run.train_seconds, "state_mb": run.state_bytes / 2**20, **run.note}
        tensors = {f"mean/{name}": value for name, value in dict(run.posterior.mean).items()}
        tensors |= {f"sigma/{name}": value for name, value in dict(run.posterior.sigma).items()}
        tensors |= {f"root/{name}": value for name, value in run.roots.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        save_file(tensors, scratch, {"facts": json.dumps(facts)})
        scratch.replace(path)
        model = _model(settings, data, places)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mean = {name[5:]: value for name, value in tensors.items() if name.startswith("mean/")}
    sigma = {name[6:]: value for name, value in tensors.items() if name.startswith("sigma/")}
    roots = {name[5:]: value for name, value in tensors.items() if name.startswith("root/")}
    model.eval()
    # What BLoB trains besides is in σ by now, so a plain encoder takes the mean of every method.
    parameters = model.trained()
    with torch.no_grad():
        for name, value in mean.items():
            parameters[name].copy_(value)
    return model, correlated(mean, roots) if roots else as_posterior(mean, sigma), facts


def work_off(job: Job, rows: list[tuple[str, str]], places: Places) -> str:
    """Train one job unless it is trained, evaluate `rows` of it, and append their records; runs in a worker."""
    import torch

    from .rows import ROWS, score

    torch.set_num_threads(1)
    settings = json.loads(job.settings)
    data = _read_task(job.task, settings, places)
    model, posterior, facts = trained(job.task, job.settings, places)

    def member(text: str) -> Any:
        return trained(job.task, text, places)[1]

    sets = {"validation": data.validation, "test": data.test, **data.shifted}
    left_out: list[str] = []
    for row, name in rows:
        begun = time.process_time()
        try:
            predictions, extra = ROWS[row.split("=")[0]](
                model, posterior, data, sets[name], places.draws, row.partition("=")[2], [member, *job.members]
            )
        except ImportError as error:
            left_out.append(f"{row} left out: {error}")
            continue
        record = {
            "run": job.key,
            "task": job.task,
            "method": job.method,
            "row": row,
            "data": name,
            "settings": settings,
            "metrics": score(predictions, sets[name]),
            "extra": extra,
            "facts": facts,
            "eval_seconds": time.process_time() - begun,
            "commit": places.commit,
            "date": datetime.now().isoformat(timespec="seconds"),
        }
        append(places.results, record)
    done = f"{job.task} {job.method} seed {settings['seed']}: {facts['train_seconds']:.0f} s of training"
    return "; ".join([done, *left_out])


def run(suite: Mapping[str, Any], places: Places, workers: int, until: datetime | None) -> None:
    """Work the plan off with `workers` processes; after `until` no further job starts."""
    records = read_results(places.results)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for jobs in plan(suite, records):
            pending: list[tuple[Job, list[tuple[str, str]]]] = []
            for job in jobs:
                if rows := missing_rows(job, records):
                    pending.append((job, rows))
            running: set[Future[str]] = set()
            while pending or running:
                late = until is not None and datetime.now() >= until
                while pending and len(running) < workers and not late:
                    job, rows = pending.pop(0)
                    running.add(pool.submit(work_off, job, rows, places))
                if not running:
                    break
                done, running = wait(running, return_when="FIRST_COMPLETED")
                for future in done:
                    print(f"{datetime.now():%H:%M:%S} {future.result()}", flush=True)
            records[:] = read_results(places.results)
            if until is not None and datetime.now() >= until:
                print("The time is over; run again to go on.", flush=True)
                return


def current_commit() -> str:
    """Return the commit of the checkout, or "unknown" outside of one."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
