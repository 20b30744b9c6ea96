"""Finetuning again on new data: what is forgotten, by IVON-LoRA with yesterday's posterior as prior and by AdamW.

    python -m benchmarks.continual run --suite domains --results benchmarks/continual.jsonl
    python -m benchmarks.continual run --suite bigbench --bigbench DIR --results benchmarks/continual.jsonl
    python -m benchmarks.continual report --results benchmarks/continual.jsonl --pictures benchmarks/pictures

SmolLM2-135M with LoRA on its upper layers learns four tasks one after the other, each as the last one left it, by the
fast path of the fidelity suite (`fidelity/causal.py`). A run is one method at one value of its strength and one seed;
it appends a line of JSON when it is done, and a run that has one is skipped. With R[i, j] the score on task j after
task i and T tasks, the average accuracy is mean_j R[T, j], and the backward transfer mean_{j<T} R[T, j] − R[j, j]:
forgetting is where it is negative (Lopez-Paz and Ranzato, arXiv 1706.08840). "NLL lost" is the same of the NLL, where
forgetting is positive.

Strengths are chosen by the average NLL of the last model on the validation data of all four tasks, over the seeds that
all strengths of a method have.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_ivon import IVONLoRA
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.settings.presets import PRESETS

from .fidelity.causal import Causal
from .fidelity.data import Example, Task, collate, load_task, predict, prepare, training_batches
from .fidelity.methods import schedule
from .fidelity.run import append, current_commit, read_results

MODEL = "SmolLM2-135M-Instruct"
SHAPE = (8, ("q_proj", "v_proj"), 0.1, 6)  # rank, targets, dropout, upper layers
MAX_TOKENS, BATCH, WARMUP, DRAWS = 40, 8, 0.05, 4
SIZES = {"train": 256, "validation": 60, "test": 120}
LARGER = {"train": 256, "validation": 100, "test": 300}
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "domains": {name: {"source": name, **SIZES} for name in ("movie", "amazon", "nyt", "twitter")},
    # Two of the domains, with questions between and after them that look alike and have other answers.
    "mixed": {
        "movie": {"source": "movie", **SIZES},
        "sports": {"source": "sports_understanding", **SIZES},
        "amazon": {"source": "amazon", **SIZES},
        "winowhy": {"source": "winowhy", **SIZES},
    },
    # Four questions about the snippets, all of which are learned, and each of which needs something else of a text.
    "questions": {
        "sign": {"source": "movie", **LARGER},
        "source": {"source": "movie", "question": "source", **LARGER},
        "strength": {"source": "amazon", "question": "strength", **LARGER},
        "sign-of-tweets": {"source": "twitter", **LARGER},
    },
    "bigbench": {
        "wikihow-goal": {"source": "goal_step_wikihow_goal_inference", "pairs": True, **SIZES},
        "winowhy": {"source": "winowhy", **SIZES},
        "sports": {"source": "sports_understanding", **SIZES},
        "wikihow-step": {"source": "goal_step_wikihow_step_inference", "pairs": True, **SIZES},
    },
}
# The strengths of each method: κ of the prior, or the factor of its penalty; None where it has none.
METHODS: dict[str, list[float | None]] = {
    "ivon-prior": [1.0, 100.0, 300.0, 1000.0],
    "ivon-warm": [None],  # the same optimizer from the same mean, without the prior
    "adamw-warm": [None],
    "adamw-last": [None],
    "adamw-l2": [1e-2, 1e-1],
    "adamw-ewc": [100.0, 1000.0, 10000.0],
    "adamw-joint": [None],
}
NAMES = {
    "ivon-prior": "IVON-LoRA, posterior as prior",
    "ivon-warm": "IVON-LoRA, warm start alone",
    "adamw-warm": "AdamW, warm start",
    "adamw-last": "AdamW from the base, last task alone",
    "adamw-l2": "AdamW, L2 to the old weights",
    "adamw-ewc": "AdamW, diagonal EWC",
    "adamw-joint": "AdamW, all tasks together",
}
Weights = dict[str, Tensor]
Batches = Iterator[tuple[int, dict[str, Tensor]]]


@dataclass
class Learner:
    """A model, its tasks with their heads, and what a method keeps from task to task.

    Attributes:
        heads: per task, the rows of the output layer of its answers, (classes, hidden).
        old: σ₀ of the posterior, or the factors F of the penalty ½·strength·Σ F·(θ − θ_old)².
        anchor: m₀, or θ_old.
    """

    model: Causal
    tasks: list[Task]
    heads: list[Tensor]
    steps: int
    lr: float
    seed: int
    old: Weights = field(default_factory=dict)
    anchor: Weights = field(default_factory=dict)
    posterior: tuple[Weights, Weights] | None = None

    def keep(self, method: str, task: int) -> None:
        """Keep what the penalty of a method needs of the task that was learned."""
        self.anchor = self.weights()
        if method == "adamw-ewc":
            for name, value in fisher(self, task).items():
                self.old[name] = self.old.get(name, 0.0) + value

    def loss(self, task: int, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch of a task."""
        self.model.choices = self.heads[task]
        return F.cross_entropy(self.model(batch), batch["labels"])

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        steps: int,
        drawn: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Take the steps, with a linear schedule after a warmup."""
        scheduler = schedule(optimizer, steps, WARMUP)
        self.model.train()
        for _ in range(steps):
            task, batch = next(batches)
            with drawn():
                self.loss(task, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        self.model.eval()

    def batches(self, task: int) -> Batches:
        """Yield batches of one task for ever."""
        return ((task, batch) for batch in training_batches(self.tasks[task].train, BATCH, self.seed))

    def all_batches(self) -> Batches:
        """Yield batches of all tasks for ever, each of one of them, in random order."""
        rng, sources = random.Random(self.seed), [self.batches(task) for task in range(len(self.tasks))]
        while True:
            for task in rng.sample(range(len(sources)), len(sources)):
                yield next(sources[task])

    def weights(self) -> Weights:
        """Return a copy of the trained weights."""
        return {name: value.detach().clone() for name, value in self.model.trained().items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the model."""
        for name, value in self.model.trained().items():
            value.copy_(weights[name])

    def scores(self, task: int, examples: Sequence[Example], drawn: bool = False) -> dict[str, float]:
        """Return accuracy, NLL and ECE at the mean, or of the average over draws."""
        self.model.choices = self.heads[task]
        if drawn:
            assert self.posterior is not None
            mean, sigma = self.posterior
            generator, parts = torch.Generator().manual_seed(0), []
            for _ in range(DRAWS):
                noise = {name: torch.randn(m.shape, generator=generator) for name, m in mean.items()}
                self.load({name: m + sigma[name] * noise[name] for name, m in mean.items()})
                parts.append(predict(self.model, examples).softmax(-1))
            self.load(mean)
            probabilities = torch.stack(parts).mean(0)
        else:
            probabilities = predict(self.model, examples).softmax(-1)
        found = metrics(Scores.of(probabilities, torch.tensor([example.label for example in examples])))
        return {name: float(found[name] or 0.0) for name in ("accuracy", "nll", "ece")}


def learn_ivon(learner: Learner, task: int, strength: float | None) -> None:
    """IVON-LoRA by the preset auto; from the second task on with N(m₀, σ₀²/κ) as prior, if there is a κ."""
    parameters, preset = learner.model.trained(), PRESETS["auto"]
    ess = preset.ess(len(learner.tasks[task].train), sum(value.numel() for value in parameters.values()))
    fan_ins = [value.shape[1] for name, value in parameters.items() if ".lora_A." in name]
    own = learner.posterior if strength is not None else None
    prior: Any = {name: (own[0][name], own[1][name]) for name in parameters} if own else "empirical"
    optimizer = IVONLoRA(
        parameters.items(),
        lr=learner.lr / preset.clip,
        ess=ess,
        betas=(0.9, preset.second_beta(learner.steps)),
        h0=preset.first_h0(ess, fan_ins),
        clip=preset.clip,
        prior=prior,
        prior_strength=strength if own and strength is not None else preset.prior_strength,
        hessian="squared_gradients",
        batch_size=BATCH,
        h0_steps=preset.h0_steps,
        seed=learner.seed + 1000 * task,
    )
    learner.train(optimizer, learner.batches(task), learner.steps, optimizer.sampled_params)
    learner.posterior = (
        {name: optimizer.mean(value) for name, value in parameters.items()},
        {name: optimizer.sigma_for_next_prior(value) for name, value in parameters.items()},
    )


def learn_adamw(learner: Learner, task: int, strength: float | None, penalty: str | None = None) -> None:
    """AdamW, with a quadratic penalty on how far the weights go from the old ones from the second task on."""
    parameters = learner.model.trained()
    optimizer = torch.optim.AdamW(parameters.values(), lr=learner.lr, weight_decay=0.0)

    def pull(*_: Any) -> None:
        for name, value in parameters.items():
            factor = learner.old[name] if penalty == "ewc" else 1.0
            value.grad.add_(factor * (value.detach() - learner.anchor[name]), alpha=strength)  # type: ignore[union-attr]

    if penalty and learner.anchor:
        optimizer.register_step_pre_hook(pull)
    learner.train(optimizer, learner.batches(task), learner.steps)
    learner.keep(f"adamw-{penalty}", task)


def fisher(learner: Learner, task: int) -> Weights:
    """Return the diagonal Fisher information of an example, with labels drawn from the model (arXiv 1612.00796)."""
    generator = torch.Generator().manual_seed(learner.seed)
    total = {name: torch.zeros_like(value) for name, value in learner.model.trained().items()}
    examples = learner.tasks[task].train
    learner.model.choices = learner.heads[task]
    for example in examples:
        logits = learner.model(collate([example]))
        label = torch.multinomial(logits.detach().softmax(-1)[0], 1, generator=generator)
        F.cross_entropy(logits, label).backward()
        for name, value in learner.model.trained().items():
            total[name] += value.grad.square() / len(examples)  # type: ignore[union-attr]
            value.grad = None
    return total


def learn(learner: Learner, method: str, task: int, strength: float | None) -> None:
    """Learn one task of the sequence."""
    last = len(learner.tasks) - 1
    if method in ("adamw-last", "adamw-joint"):
        if task < last:
            return
        if method == "adamw-last":
            learn_adamw(learner, task, None)
        else:
            steps = learner.steps * len(learner.tasks)
            optimizer = torch.optim.AdamW(learner.model.trained().values(), lr=learner.lr, weight_decay=0.0)
            learner.train(optimizer, learner.all_batches(), steps)
    elif method.startswith("ivon"):
        learn_ivon(learner, task, strength)
    else:
        learn_adamw(learner, task, strength, {"adamw-l2": "l2", "adamw-ewc": "ewc"}.get(method))


def sequence(
    suite: str, method: str, strength: float | None, settings: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Run one method through a suite, and return its record: scores on every task after each."""
    tasks, heads, model = load_suite(suite, settings["bigbench"], folder, settings["seed"])
    learner = Learner(model, tasks, heads, settings["steps"], settings["lr"], settings["seed"])
    begun, test, validation, draws = time.process_time(), [], [], []
    count, once = len(tasks), method in ("adamw-last", "adamw-joint")
    for task in range(count):
        torch.manual_seed(settings["seed"] + 1000 * (task + 1))
        first = (
            (suite, method[:5], *(settings[name] for name in ("steps", "lr", "seed"))) if not (task or once) else None
        )
        if first in _FIRST:  # the same for all methods of an optimizer
            weights, learner.posterior, scores = _FIRST[first]
            learner.load(weights)
            learner.keep(method, task)
            test.append(scores)
            continue
        learn(learner, method, task, strength)
        if once and task < count - 1:
            continue
        test.append([learner.scores(j, tasks[j].test) for j in range(count if task == count - 1 else task + 1)])
        if first:
            _FIRST[first] = learner.weights(), learner.posterior, test[-1]
        if task == count - 1:
            validation = [learner.scores(j, tasks[j].validation) for j in range(count)]
            if learner.posterior:
                draws = [learner.scores(j, tasks[j].test, drawn=True) for j in range(count)]
    return {
        "suite": suite,
        "method": method,
        "strength": strength,
        **{name: settings[name] for name in ("steps", "lr", "seed")},
        "tasks": list(SUITES[suite]),
        "test": test,
        "validation": validation,
        "draws": draws,
        "cpu_seconds": round(time.process_time() - begun, 1),
        "commit": current_commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


_TASKS: dict[str, list[Task]] = {}
_FIRST: dict[Any, tuple[Weights, Any, list[dict[str, float]]]] = {}


def load_suite(suite: str, bigbench: Path | None, folder: Path, seed: int) -> tuple[list[Task], list[Tensor], Causal]:
    """Return the tasks with their frozen layers applied, the rows of the output layer of their answers, and a model."""
    base = folder.parent / MODEL
    if suite not in _TASKS:
        plain = [load_task(spec, folder, bigbench, MAX_TOKENS, base, causal=True) for spec in SUITES[suite].values()]
        _TASKS[suite] = [frozen(task, folder, base) for task in plain]
    tasks = _TASKS[suite]
    model = Causal(base, tasks[0].choices, seed, *SHAPE)
    rows = model.peft.base_model.model.lm_head.weight
    return tasks, [rows[list(task.choices)].detach().float() for task in tasks], model


def frozen(task: Task, folder: Path, base: Path) -> Task:
    """Return a task with its frozen layers applied; they are kept in the work folder, as they take a minute a suite."""
    parts = (task.train, task.validation, task.test)
    texts = repr([(example.ids, example.label) for part in parts for example in part])
    path = folder / f"frozen-{SHAPE[-1]}-{hashlib.sha256(texts.encode()).hexdigest()[:16]}.pt"
    if not path.is_file():
        freeze = Causal(base, task.choices, 0, *SHAPE).eval().freeze
        torch.save([[example.hidden for example in freeze(part)] for part in parts], path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    hidden = torch.load(path, weights_only=True)
    train, validation, test = (
        [replace(example, hidden=one) for example, one in zip(part, own, strict=True)]
        for part, own in zip(parts, hidden, strict=True)
    )
    return Task(train, validation, test, {}, task.classes, task.choices)


# -------------------------------------------------------------------- what came of it


def accuracies(record: Mapping[str, Any]) -> Tensor:
    """Return R, accuracy on task j after task i, float64 (stages, tasks); NaN for tasks that were not met yet."""
    size = len(record["tasks"])
    rows = [[one["accuracy"] for one in row] + [float("nan")] * (size - len(row)) for row in record["test"]]
    return torch.tensor(rows, dtype=torch.float64)


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a run is judged by, in percent but for the NLL."""
    r, last = accuracies(record), record["test"][-1]
    found = {
        "average": 100 * float(r[-1].mean()),
        "newest": 100 * float(r[-1, -1]),
        "nll": sum(one["nll"] for one in last) / len(last),
        "ece": 100 * sum(one["ece"] for one in last) / len(last),
    }
    if len(r) > 1:
        found["backward"] = 100 * float((r[-1] - r.diagonal())[:-1].mean())
        lost = [last[j]["nll"] - row[j]["nll"] for j, row in enumerate(record["test"][:-1])]
        found["lost"] = sum(lost) / len(lost)
    if record["draws"]:
        count = len(record["draws"])
        found |= {
            "draws_average": 100 * sum(one["accuracy"] for one in record["draws"]) / count,
            "draws_nll": sum(one["nll"] for one in record["draws"]) / count,
            "draws_ece": 100 * sum(one["ece"] for one in record["draws"]) / count,
        }
    return found


def by_strength(records: Sequence[Mapping[str, Any]], suite: str) -> dict[str, dict[float | None, list[Any]]]:
    """Return the records of a suite by method and strength."""
    found: dict[str, dict[float | None, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["suite"] == suite:
            found[record["method"]][record["strength"]].append(record)
    return found


def validation_nll(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the average NLL on the validation data of all tasks, after the last."""
    values = [one["nll"] for record in records for one in record["validation"]]
    return sum(values) / len(values)


def chosen(runs: Mapping[float | None, Sequence[Mapping[str, Any]]]) -> float | None:
    """Return the strength with the lowest validation NLL over the seeds that all strengths have."""
    seeds = set.intersection(*({run["seed"] for run in some} for some in runs.values()))
    return min(runs, key=lambda value: validation_nll([run for run in runs[value] if run["seed"] in seeds]))


COLUMNS = {
    "average": "average accuracy, %",
    "backward": "backward transfer, points",
    "lost": "NLL lost since learned",
    "newest": "newest task, %",
    "nll": "NLL",
    "ece": "ECE, %",
}


def report(records: Sequence[Mapping[str, Any]], pictures: Path | None) -> str:
    """Return the tables as Markdown, and draw the accuracy matrices."""
    parts = []
    for suite, tasks in SUITES.items():
        methods = by_strength(records, suite)
        if not methods:
            continue
        rows = [f"### {suite}: {', '.join(tasks)}", "", f"| | strength | seeds | {' | '.join(COLUMNS.values())} |"]
        rows.append("|---|---:|---:|" + "---:|" * len(COLUMNS))
        for method, name in NAMES.items():
            if method not in methods:
                continue
            best = chosen(methods[method])
            for strength, runs in sorted(methods[method].items(), key=lambda item: item[0] or 0):
                found = [summary(run) for run in runs]
                cells = [column_text([one[column] for one in found if column in one], column) for column in COLUMNS]
                mark = "" if len(methods[method]) == 1 else f"{strength:g}" + (" (chosen)" if strength == best else "")
                rows.append(f"| {name} | {mark} | {len(runs)} | {' | '.join(cells)} |")
                if strength == best and runs[0]["draws"]:
                    cells = [
                        column_text([one[f"draws_{c}"] for one in found], c) if f"draws_{c}" in found[0] else ""
                        for c in COLUMNS
                    ]
                    rows.append(f"| … {DRAWS} draws | {mark} | {len(runs)} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
        if pictures is not None:
            draw(methods, list(tasks), pictures / f"continual-{suite}.png")
    return "\n\n".join(parts)


def column_text(values: Sequence[float], column: str) -> str:
    """Return mean ± standard error over seeds, or nothing."""
    if not values:
        return ""
    digits, numbers = 3 if column in ("nll", "lost") else 1, torch.tensor(values, dtype=torch.float64)
    text = (
        f"{float(numbers.mean()):+.{digits}f}"
        if column in ("backward", "lost")
        else f"{float(numbers.mean()):.{digits}f}"
    )
    return text if len(values) == 1 else f"{text} ± {float(numbers.std()) / len(values) ** 0.5:.{digits}f}"


def draw(methods: Mapping[str, Mapping[float | None, Sequence[Any]]], tasks: list[str], path: Path) -> None:
    """Draw the accuracy matrices of the methods that learn one task after the other, averaged over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [method for method in ("adamw-warm", "adamw-ewc", "ivon-prior") if method in methods]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.5), squeeze=False, layout="constrained")
    for axis, method in zip(axes[0], shown, strict=True):
        runs = methods[method][chosen(methods[method])]
        matrix = 100 * torch.stack([accuracies(run) for run in runs]).mean(0)
        axis.imshow(matrix, cmap="viridis", vmin=50, vmax=90)
        for i in range(len(tasks)):
            for j in range(i + 1):
                value = float(matrix[i, j])
                weight = "bold" if i == j else "normal"
                axis.text(
                    j, i, f"{value:.0f}", ha="center", va="center", weight=weight, color="w" if value < 75 else "k"
                )
        axis.set_title(NAMES[method], fontsize=10)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8, rotation=20)
        axis.set_yticks(
            range(len(tasks)), [f"after {task}" for task in tasks] if axis is axes[0][0] else [], fontsize=8
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Work off what has no line in the results yet, seed by seed."""
    torch.set_num_threads(args.threads)
    prepare(args.work, MODEL)
    identity = ("suite", "method", "strength", "steps", "lr", "seed")
    done = {tuple(record[name] for name in identity) for record in read_results(args.results)}
    chosen = {name: METHODS[name] for name in (args.methods.split(",") if args.methods else METHODS)}
    for seed in map(int, args.seeds.split(",")):
        for method, strengths in chosen.items():
            for strength in strengths if args.strengths is None else map(float, args.strengths.split(",")):
                if args.until and datetime.now() >= args.until:
                    print("The time is over; run again to go on.", flush=True)
                    return
                lr = args.lr
                if (args.suite, method, strength, args.steps, lr, seed) in done:
                    continue
                settings = {"steps": args.steps, "lr": lr, "seed": seed, "bigbench": args.bigbench}
                record = sequence(args.suite, method, strength, settings, args.work)
                append(args.results, record)
                told = ", ".join(f"{name} {value:.3f}" for name, value in summary(record).items())
                nll = validation_nll([record])
                seconds = record["cpu_seconds"]
                print(f"{method} {strength} seed {seed} ({seconds:.0f} s): {told}, validation {nll:.3f}", flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Continual finetuning: forgetting, measured.")
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train and evaluate what is missing")
    runs.add_argument("--suite", choices=SUITES, default="domains")
    runs.add_argument("--bigbench", type=Path, help="folder of the BIG-bench tasks")
    runs.add_argument("--results", type=Path, default=Path("benchmarks/continual.jsonl"))
    runs.add_argument("--methods", help="names with commas between; all by default")
    runs.add_argument("--strengths", help="numbers with commas between, in place of the methods' own")
    runs.add_argument("--seeds", default="0,1,2,3,4")
    runs.add_argument("--steps", type=int, default=160, help="per task")
    runs.add_argument(
        "--lr", type=float, default=5e-4, help="AdamW's, and the most that a step of IVON may move a weight"
    )
    runs.add_argument("--work", type=Path, default=Path(".demo/fidelity"), help="for data; beside it, the base model")
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--until", type=datetime.fromisoformat, help="start nothing after this time")
    runs.set_defaults(call=run)
    reports = commands.add_parser("report", help="print the tables and draw the pictures")
    reports.add_argument("--results", type=Path, default=Path("benchmarks/continual.jsonl"))
    reports.add_argument("--pictures", type=Path)
    reports.set_defaults(call=lambda args: print(report(read_results(args.results), args.pictures)))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
