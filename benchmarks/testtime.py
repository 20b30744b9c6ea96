"""Test-time scaling: do n outputs from draws of the posterior beat n outputs of one model?

    python -m benchmarks.testtime run --quick        # SmolLM2-135M adds and subtracts; one seed, an hour
    python -m benchmarks.testtime run                # the other suites: three seeds, hours
    python -m benchmarks.testtime report --pictures benchmarks/pictures
    python -m benchmarks.testtime speed              # tokens per second of one model and of 8 draws

Problems and their worked answers are made by the package `reasoning-gym` (in the extra `benchmarks`). A model learns
them by the fast path of the fidelity suite (`fidelity/causal.py`) and writes n outputs for every test problem with the
engine of `ivon-post generate`; `ivon-post mbr` votes. The outputs of the largest n are written once for every method,
into the work folder; a smaller n is a part of them (`part`). Results go to a JSONL file, a line for a method and a
seed, from which an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from axolotl_ivon import Posterior
from axolotl_ivon.data.encode import Prompt
from axolotl_ivon.generation.endpoint import EndpointEngine
from axolotl_ivon.generation.local import TransformersEngine
from axolotl_ivon.generation.mbr import CurvePoint, MBRSettings, mbr
from axolotl_ivon.generation.nbest import NBest, NBestFile, read_nbest
from axolotl_ivon.generation.plan import Engine, Plan
from axolotl_ivon.generation.uncertainty import MEASURES, or_none
from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor, exact
from axolotl_ivon.metrics.auroc import auroc
from axolotl_ivon.metrics.selective import RiskCoverage
from axolotl_ivon.models.draws import AdapterSlots
from axolotl_ivon.plots.scaling import scaling
from axolotl_ivon.settings.presets import passes, usual_rate

from . import evaluation
from .fidelity import qwen
from .fidelity.causal import Causal
from .fidelity.data import Example, Task, collate, prepare
from .fidelity.methods import TRAINERS, as_posterior
from .fidelity.page import PLACE
from .fidelity.report import table
from .fidelity.run import append, canonical, current_commit, read_results, run_key
from .serving import IVON_POST, free_port, running, write_adapter

SMOLLM2 = "SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "v_proj")
LINEAR = (*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPLITS = ("train", "validation", "test")
ANSWERS = AnswerExtractor("gsm8k")
VOTE = MBRSettings(exact(ANSWERS), ANSWERS)
COVERAGE = 0.8
# The paper's values for GSM8k (arXiv 2506.14280), where λ is given outright.
PAPER = {"trainer": "ivon-lora", "lr": 3e-2, "clip": 1e-2, "h0": 5e-3, "beta2": 0.99999}
PAPER_ESS = 1e7


@dataclass(frozen=True)
class Method:
    """Who writes the outputs: the weights or mean of a run, draws around it, or several runs.

    Attributes:
        optimizer: "adamw", "auto" or "paper".
        runs: how many runs, of different seeds, share the outputs.
        draws: whether draws write, in place of the mean.
        criterion: by which a tenth of the weights is pruned; None for none.
        tuned: whether τ is chosen on the validation problems; else it is 1.
    """

    optimizer: str
    runs: int = 1
    draws: bool = False
    criterion: str | None = None
    tuned: bool = False


METHODS = {
    "AdamW": Method("adamw"),
    "AdamW, 4 runs": Method("adamw", runs=4),
    "auto, mean": Method("auto"),
    "auto, draws": Method("auto", draws=True),
    "auto, draws, pruned by SNR": Method("auto", draws=True, criterion="snr"),
    "auto, draws, pruned by σ": Method("auto", draws=True, criterion="sigma"),
    "auto, draws, pruned at random": Method("auto", draws=True, criterion="random"),
    "auto, draws, pruned by SNR, τ chosen": Method("auto", draws=True, criterion="snr", tuned=True),
    "paper, mean": Method("paper"),
    "paper, draws": Method("paper", draws=True),
    "paper, draws, pruned by SNR": Method("paper", draws=True, criterion="snr"),
}
ONE_MODEL = {"adamw": "AdamW", "auto": "auto, mean", "paper": "paper, mean"}  # what the others are compared with
PRUNED = ("auto, mean", *(name for name, method in METHODS.items() if method.optimizer == "auto" and method.draws))
RATIO = 0.1  # the paper's share of pruned weights


@dataclass(frozen=True)
class Suite:
    """One model on one kind of problems.

    Attributes:
        sizes: of the three sets of problems.
        lrs: AdamW's rate is the one of these with the lowest validation loss; auto has the one that it takes by itself.
        counts: the numbers of outputs per problem, the largest last; each doubles the one before.
        per_model: outputs of each draw.
        temperatures, taus: among which the validation problems choose.
        tuning: outputs per validation problem.
        utilities: others than the vote, measured once, with `compared` outputs of each method.
    """

    model: str
    task: str
    methods: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    sizes: Sequence[int] = (1000, 60, 200)
    rank: int = 8
    targets: Sequence[str] = ATTENTION
    steps: int = 375  # 6 epochs
    batch: int = 16
    lrs: Sequence[float] = (2e-4, 5e-4, 1e-3)
    counts: Sequence[int] = (8, 16, 32, 64, 128)
    per_model: int = 8
    temperatures: Sequence[float] = (0.5, 0.7, 1.0)
    taus: Sequence[float] = (0.5, 1.0, 2.0, 4.0)
    tuning: int = 16
    max_tokens: int = 256
    utilities: Sequence[str] = ("bleu", "chrf", "rouge")
    compared: int = 32


QUICK = "quick"
SMALL = Suite(
    SMOLLM2,
    "sums",
    (*PRUNED[:3], "AdamW", *PRUNED[3:]),
    seeds=(0,),
    sizes=(256, 32, 100),
    steps=160,
    batch=8,
    lrs=(1e-3,),
    counts=(4, 8, 16),
    per_model=4,
    temperatures=(0.5, 1.0),
    tuning=8,
    max_tokens=32,
    compared=16,
)
SUITES = {
    QUICK: SMALL,
    "many": replace(SMALL, methods=SMALL.methods[:4], counts=(8, 16, 32, 64, 128), per_model=8, utilities=()),
    # the same at a sampling temperature of 1, at which more outputs go on helping
    "warm": replace(
        SMALL,
        methods=("auto, mean", "auto, draws, pruned by SNR", "AdamW"),
        seeds=(0, 1, 2),
        counts=(8, 16, 32, 64, 128),
        per_model=8,
        temperatures=(1.0,),
        utilities=(),
    ),
    # 16 epochs, in which AdamW begins to overfit
    "longer": replace(SMALL, methods=SMALL.methods[:4], steps=500, lrs=(2e-4, 5e-4, 1e-3)),
    "sums": Suite(SMOLLM2, "sums", list(METHODS), max_tokens=40),
    "words": Suite(qwen.NAME, "words", list(METHODS)),
    "words-all": Suite(qwen.NAME, "words", list(METHODS), rank=16, targets=LINEAR),
}


# -------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A question, its answer with the working and `#### 7` at the end, and the number of the template of both."""

    question: str
    answer: str
    template: int


def sums(seed: int, templates: Sequence[int]) -> Iterator[Problem]:
    """Sums and differences of three digits (`chain_sum`), one operation after the other."""
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

    config = ChainSumConfig(min_terms=3, max_terms=3, min_digits=1, max_digits=1, seed=seed, size=2**31)
    dataset = ChainSumDataset(config)
    for number in itertools.count():
        item = dataset[number]
        expression = item["metadata"]["expression"]
        yield Problem(f"{expression} = ?", "\n".join([*working(expression), f"#### {item['answer']}"]), 0)


def working(expression: str) -> list[str]:
    """Return a sum or difference of several numbers in steps: `4 - 1 = 3` and `3 - 7 = -4` for `4 - 1 - 7`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) * (1 if sign == "+" else -1)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return lines


def words(seed: int, templates: Sequence[int]) -> Iterator[Problem]:
    """Word problems out of the templates with these numbers (`gsm_symbolic`)."""
    from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic as gsm

    generators = gsm.GSMSymbolicDataset(gsm.GSMSymbolicDatasetConfig(seed=seed, size=1)).generators
    rng = random.Random(seed)
    for number in itertools.count():
        template = rng.choice(templates)
        item = generators[template](random.Random(seed + number), 1.0)
        answer = item.get("answer_cot") or item["metadata"]["answer_cot"]
        if ANSWERS(answer) == ANSWERS(f"#### {item['answer']}"):
            yield Problem(item["question"], answer, template)


def templates_of(task: str) -> list[int]:
    """Return the numbers of the templates of a kind of problems."""
    if task == "sums":
        return [0]
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    return list(tasks_ok)


GENERATORS: dict[str, Callable[[int, Sequence[int]], Iterator[Problem]]] = {"sums": sums, "words": words}
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}  # of the templates


def split_templates(templates: Sequence[int]) -> dict[str, list[int]]:
    """Return the templates of each set: no two share one, unless there are fewer than sets."""
    if len(templates) < len(SPLITS):
        return {split: list(templates) for split in SPLITS}
    order = random.Random(0).sample(list(templates), len(templates))
    ends = [round(len(order) * share) for share in itertools.accumulate(SHARES.values())]
    return {split: order[begin:end] for split, begin, end in zip(SPLITS, [0, *ends], ends, strict=False)}


def make_problems(task: str, sizes: Sequence[int]) -> dict[str, list[Problem]]:
    """Return the problems of each set, by seeds of their own; no question is there twice."""
    templates = split_templates(templates_of(task))
    problems: dict[str, list[Problem]] = {}
    seen: set[str] = set()
    # The smallest sets first, so that they do not depend on the number of training problems.
    for number, split in reversed(list(enumerate(SPLITS))):
        problems[split] = []
        for problem in GENERATORS[task](10**8 * (number + 1), templates[split]):
            if len(problems[split]) == sizes[number]:
                break
            if problem.question not in seen:
                problems[split].append(problem)
                seen.add(problem.question)
    return problems


def count_templates(problems: Mapping[str, Sequence[Problem]]) -> dict[str, int]:
    """Return how many templates each set has, and how many of the test set's are in training too."""
    templates = {split: {problem.template for problem in problems[split]} for split in SPLITS}
    counts = {split: len(numbers) for split, numbers in templates.items()}
    return counts | {"shared": len(templates["train"] & templates["test"])}


def encode(tokenizer: Any, problem: Problem) -> Example:
    """Return a problem as a text to be written; its labels are tokens."""
    prompt = prompt_ids(tokenizer, problem)
    answer = [*tokenizer(problem.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Example([*prompt, *answer[:-1]], 0, answer=tuple(answer))


def prompt_ids(tokenizer: Any, problem: Problem) -> list[int]:
    """Return the token ids of a question."""
    return list(tokenizer(f"{problem.question}\n", add_special_tokens=False)["input_ids"])


# -------------------------------------------------------------------- training and writing


def make_session(model: Any, tokenizer: Any) -> Any:
    """Return enough of a `Session` for an engine."""
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, slots=AdapterSlots(model), max_length=None, check_tokens=lambda *_: None
    )


@dataclass
class Solver:
    """A model of a suite in memory, the problems, and what it has been trained to by each optimizer and seed."""

    suite: Suite
    problems: dict[str, list[Problem]]
    folder: Path  # of the base model
    work: Path

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.load(0)

    @cached_property
    def task(self) -> Task:
        """The problems as `fidelity` trains on them."""
        sets = {split: [encode(self.tokenizer, problem) for problem in self.problems[split]] for split in SPLITS[:2]}
        return Task(sets["train"], sets["validation"], [], {}, 0)

    def load(self, seed: int) -> None:
        """Put the base model with a new adapter into memory."""
        from transformers import AutoConfig

        config, suite = AutoConfig.from_pretrained(self.folder), self.suite
        shape = (suite.rank, suite.targets, 0.0, config.num_hidden_layers)
        self.model: Any = Causal(self.folder, range(config.vocab_size), seed, *shape, torch.float32).eval()
        self.session = make_session(self.model.peft, self.tokenizer)

    def settings(self, optimizer: str, seed: int, lr: float) -> dict[str, Any]:
        """Return what a run depends on; `lr` is AdamW's."""
        from transformers import AutoConfig

        suite = self.suite
        size = suite.sizes[0]
        config = AutoConfig.from_pretrained(self.folder)
        matrices = len(suite.targets) * config.num_hidden_layers
        usual = usual_rate(config, passes(suite.steps, size, suite.batch), matrices)
        trainers = {"adamw": {"trainer": "adamw", "lr": lr}, "auto": {"trainer": "ivon-auto", "lr": usual}}
        return {
            **trainers.get(optimizer, {**PAPER, "weight": PAPER_ESS / size}),
            **{name: getattr(suite, name) for name in ("model", "task", "rank", "targets", "steps", "batch")},
            "train": size,
            "seed": seed,
        }

    def trained(self, settings: Mapping[str, Any]) -> tuple[Posterior, dict[str, Any]]:
        """Return the posterior of a run and facts of it: read from the work folder, or trained and left there."""
        path = self.work / f"{run_key(canonical(settings))}.safetensors"
        if not path.is_file():
            print(f"{datetime.now():%H:%M} training: {canonical(settings)}", flush=True)
            self.load(settings["seed"])
            run = TRAINERS[settings["trainer"]](self.model, self.task, settings)
            tensors = {
                f"{part}/{name.replace('.default.', '.')}": value  # PEFT's key of the parameter
                for part, own in (("mean", run.posterior.mean), ("sigma", run.posterior.sigma))
                for name, value in dict(own).items()
            }
            with self.session.slots.loaded(_strip(tensors, "mean/")):
                loss = self.loss(self.task.validation)
            facts = {"train_seconds": run.train_seconds, "validation_loss": loss, "losses": run.note.get("losses", [])}
            save_file(tensors, path.with_suffix(".new"), {"facts": json.dumps(facts)})
            path.with_suffix(".new").replace(path)
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return as_posterior(_strip(tensors, "mean/"), _strip(tensors, "sigma/")), facts

    @torch.no_grad()
    def loss(self, examples: Sequence[Example], size: int = 8) -> float:
        """Return the mean loss of a token of the answers, in nats."""
        total, count = 0.0, 0
        for begin in range(0, len(examples), size):
            batch = collate(examples[begin : begin + size])
            total += float(F.cross_entropy(self.model(batch), batch["labels"], reduction="sum"))
            count += len(batch["labels"])
        return total / count

    def rate(self) -> float:
        """Return AdamW's learning rate: that with the lowest validation loss, on the first seed."""
        return best(self.suite.lrs, lambda lr: -self.trained(self.settings("adamw", 0, lr))[1]["validation_loss"])

    def prompts(self, split: str) -> list[Prompt]:
        """Return the problems of a set as prompts."""
        return [
            Prompt(problem.question, prompt_ids(self.tokenizer, problem), problem.answer, f"{split}:{number}")
            for number, problem in enumerate(self.problems[split], 1)
        ]

    def write(self, split: str, members: Sequence[tuple[Posterior, Plan]], key: Mapping[str, Any]) -> list[NBest]:
        """Return the outputs for a set of problems, from the work folder as far as they are there."""
        settings = {"split": split, **key, "plans": [asdict(plan) for _, plan in members]}
        path = self.work / f"{run_key(canonical(settings))}.jsonl"
        file = NBestFile(path, settings)
        prompts = self.prompts(split)
        start = file.resume(prompts)
        engines = (TransformersEngine(self.session, posterior, plan) for posterior, plan in members)
        each = zip(*(engine.outputs(prompts, start) for engine in engines), strict=True)
        for prompt, parts in zip(prompts[start:], each, strict=True):
            numbered = ((run, output) for run, outputs in enumerate(parts) for output in outputs)
            # The one model of a run is 0 to its engine.
            file.append(prompt, [o._replace(member=run) if len(members) > 1 else o for run, o in numbered])
        file.close()
        return read_nbest(path)


def _strip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return what begins with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# -------------------------------------------------------------------- figures


def part(nbest: NBest, n: int, per_draw: int | None) -> NBest:
    """Return n of a prompt's outputs, as a run with that n would have them: as many of every member that is in it.

    Of draws with `per_draw` outputs each, those are the first n/`per_draw`, whole. Of one model (`per_draw` None) they
    are its first n outputs; of several runs, which do not become more, n/runs outputs of each.
    """
    members = sorted(set(nbest.members))[: n // per_draw if per_draw else None]
    each = n // len(members)
    place = [i for member in members for i in np.flatnonzero(np.equal(nbest.members, member))[:each]]
    texts, numbers, logprobs = zip(*[(nbest.texts[i], nbest.members[i], nbest.logprobs[i]) for i in place], strict=True)
    return replace(nbest, texts=texts, members=numbers, logprobs=logprobs)


def is_sure(answers: Sequence[str | None]) -> bool:
    """Say whether more outputs would hardly change a vote: its lead is above two standard errors, √(first + second)."""
    votes = sorted(Counter(answer for answer in answers if answer is not None).values(), reverse=True)
    first, second = [*votes, 0, 0][:2]
    return first - second > 2 * math.sqrt(first + second)


def draws_differ(answers: Sequence[str | None], members: Sequence[int]) -> bool:
    """Say whether the votes of single members differ; of equally frequent answers a member's first counts."""
    votes = set()
    for member in set(members):
        own = [answer for answer, number in zip(answers, members, strict=True) if number == member]
        votes.add(Counter(own).most_common(1)[0][0])
    return len(votes) > 1


def telling(unsure: Sequence[float], wrong: np.ndarray, resamples: int = 1000) -> dict[str, float | None]:
    """Return how well a measure, more of which is less sure, tells wrong answers, with bootstrap standard errors.

    `answered` is the accuracy of the most sure 80 %. A figure without a value is None.
    """
    # Equal values may differ in their last bits, as sums in another order do: that is no order.
    score = np.round(np.asarray(unsure, float), 12)
    times = np.random.default_rng(0).multinomial(len(wrong), np.full(len(wrong), 1 / len(wrong)), resamples)
    figures: dict[str, float | None] = {}
    for name, values in (("", np.ones((1, len(wrong)))), ("_se", times.astype(float))):
        curve = RiskCoverage(-score, wrong, values)
        for figure, found in (
            ("auroc", auroc(score, wrong, values)),
            ("aurc", curve.aurc()),
            ("answered", 1 - curve.risk_at(COVERAGE)),
        ):
            known = found[np.isfinite(found)]
            value = (known.std() if name else known[0]) if len(known) else math.nan
            figures[figure + name] = or_none(round(float(value), 4))
    return figures


def figures(nbests: Sequence[NBest]) -> dict[str, Any]:
    """Return what is measured of the outputs for a set of problems."""
    result = mbr(nbests, VOTE)
    answers = [[ANSWERS(text) for text in nbest.texts] for nbest in nbests]
    references = [ANSWERS(nbest.reference or "") for nbest in nbests]
    hits = np.array([[a == reference for a in own] for own, reference in zip(answers, references, strict=True)])
    wrong = 1 - np.array(result.right)
    several = len(set(nbests[0].members)) > 1
    unsure = {
        name: [sign * getattr(choice.uncertainty, name) for choice in result.choices]
        for name, sign in MEASURES.items()
        if several or name not in ("mutual_information", "semantic_entropy")
    }
    unsure["disagreement"] = [choice.disagreement for choice in result.choices]
    return {
        "right": "".join(str(int(value)) for value in result.right),
        "accuracy": float(np.mean(result.right)),
        "single": float(hits.mean()),
        "pass": float(hits.any(1).mean()),
        "sure": float(np.mean([is_sure(own) for own in answers])),
        "differ": float(np.mean([draws_differ(a, nbest.members) for a, nbest in zip(answers, nbests, strict=True)]))
        if several
        else None,
        "telling": {name: telling(values, wrong) for name, values in unsure.items()},
    }


# -------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Experiment:
    """One method of a suite, with one seed and AdamW's rate."""

    solver: Solver
    name: str
    seed: int
    lr: float

    @property
    def method(self) -> Method:
        """Who writes."""
        return METHODS[self.name]

    def outputs(self, split: str, n: int, tau: float, temperature: float) -> list[NBest]:
        """Return n outputs for every problem of a set."""
        method, suite = self.method, self.solver.suite
        settings = [self.solver.settings(method.optimizer, self.seed + 100 * i, self.lr) for i in range(method.runs)]
        members: list[tuple[Posterior, Plan]] = []
        for own in settings:
            posterior, _ = self.solver.trained(own)
            plan = Plan(n, n, not method.draws, temperature, max_tokens=suite.max_tokens, seed=own["seed"])
            if method.draws:
                posterior = posterior.temper(tau)
                if method.criterion:
                    posterior = posterior.prune(RATIO, criterion=method.criterion)
                plan = replace(plan, per_model=suite.per_model)
            members.append((posterior, replace(plan, n=n // method.runs)))
        return self.solver.write(split, members, {"runs": settings, "method": asdict(method), "tau": tau})

    def part(self, nbests: Sequence[NBest], n: int) -> list[NBest]:
        """Return n outputs of each problem."""
        return [part(nbest, n, self.solver.suite.per_model if self.method.draws else None) for nbest in nbests]

    def tune(self) -> tuple[float, float]:
        """Return τ and the sampling temperature with the most right votes on the validation problems.

        Of as many right votes, those with the most right outputs. τ is chosen at the temperature 1, and then that.
        """
        suite = self.solver.suite

        def score(tau: float, temperature: float) -> tuple[float, float]:
            result = mbr(self.outputs("validation", suite.tuning, tau, temperature), VOTE)
            return result.curve[-1].accuracy, result.single or 0.0

        taus = suite.taus if self.method.tuned else (1.0,)
        tau = best(taus, lambda value: score(value, 1.0))
        return tau, best(suite.temperatures, lambda value: score(tau, value))

    def measure(self) -> dict[str, Any]:
        """Return the record."""
        solver, suite = self.solver, self.solver.suite
        tau, temperature = self.tune()
        settings = solver.settings(self.method.optimizer, self.seed, self.lr)
        facts = solver.trained(settings)[1]
        begun = time.process_time()
        nbests = self.outputs("test", suite.counts[-1], tau, temperature)
        seconds = time.process_time() - begun
        compared = self.part(nbests, min(suite.compared, suite.counts[-1]))
        return {
            "method": self.name,
            "seed": self.seed,
            "lr": settings["lr"],
            "tau": tau,
            "temperature": temperature,
            "train_seconds": round(facts["train_seconds"]),
            "validation_loss": round(facts["validation_loss"], 4),
            "write_seconds": round(seconds),
            "templates": count_templates(solver.problems),
            "problems": len(nbests),
            "by_n": {str(n): figures(self.part(nbests, n)) for n in suite.counts},
            "utilities": {
                utility: mbr(compared, MBRSettings(UTILITIES[utility](ANSWERS), ANSWERS)).curve[-1].accuracy
                for utility in suite.utilities
            },
            "commit": current_commit(),
            "date": datetime.now().isoformat(timespec="seconds"),
        }


def best(values: Sequence[float], score: Callable[[float], Any]) -> float:
    """Return the value with the highest score; a single one is not measured."""
    return values[0] if len(values) == 1 else max(values, key=score)


def run(arguments: argparse.Namespace) -> None:
    """Work off what has no line in the results yet, seed by seed."""
    torch.set_num_threads(arguments.threads)
    for name in [QUICK] if arguments.quick else arguments.suites:
        suite = SUITES[name]
        done = {(r["suite"], r["method"], r["seed"]) for r in read_results(arguments.results)}
        chosen = itertools.product(arguments.seeds or suite.seeds, arguments.methods or suite.methods)
        todo = [(seed, method) for seed, method in chosen if (name, method, seed) not in done]
        if not todo:
            continue
        prepare(arguments.work, suite.model)
        work = arguments.work.parent / "testtime"
        work.mkdir(parents=True, exist_ok=True)
        solver = Solver(suite, make_problems(suite.task, suite.sizes), arguments.work.parent / suite.model, work)
        lr = solver.rate()
        for seed, method in todo:
            if arguments.until and datetime.now() >= arguments.until:
                print("The time is over; run again to go on.", flush=True)
                return
            record = {"suite": name, **Experiment(solver, method, seed, lr).measure()}
            append(arguments.results, record)
            shown = ", ".join(f"{n}: {100 * own['accuracy']:.1f} %" for n, own in record["by_n"].items())
            took = f"{record['train_seconds']} s of training, {record['write_seconds']} s of writing"
            print(f"{datetime.now():%H:%M} {name}, {method}, seed {seed} ({took}): {shown}", flush=True)


# -------------------------------------------------------------------- what came of it


def by_method(records: Sequence[Mapping[str, Any]], suite: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return the records of a suite by method, in the order of the suite, and then of methods that were asked for."""
    names = dict.fromkeys([*SUITES[suite].methods, *METHODS])
    own = {name: [r for r in records if (r["suite"], r["method"]) == (suite, name)] for name in names}
    return {name: runs for name, runs in own.items() if runs}


def rights(runs: Sequence[Mapping[str, Any]], n: int) -> np.ndarray:
    """Return how often each problem's choice is right, over seeds, float64 (problems,)."""
    return np.mean([[float(value) for value in run["by_n"][str(n)]["right"]] for run in runs], 0)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over problems and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def percent(values: np.ndarray, sign: str = "") -> str:
    """Return mean ± standard error in percent."""
    mean, error = mean_and_error(values)
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def accuracy_table(records: Sequence[Mapping[str, Any]], suite: str) -> str:
    """Return the accuracy of the vote of every method at every n, and what explains it."""
    counts, methods, rows = SUITES[suite].counts, by_method(records, suite), []
    for name, runs in methods.items():
        last = [r["by_n"][str(counts[-1])] for r in runs]
        figures = [[one[key] for one in last if one[key] is not None] for key in ("single", "pass", "sure", "differ")]
        one_model = methods.get(ONE_MODEL[METHODS[name].optimizer], [])
        seeds = {r["seed"] for r in runs} & {r["seed"] for r in one_model}
        gain = ""
        if seeds and one_model is not runs:
            pair = [rights([r for r in some if r["seed"] in seeds], counts[-1]) for some in (runs, one_model)]
            gain = percent(pair[0] - pair[1], "+")
        rows.append(
            [
                name,
                str(len(runs)),
                ", ".join(dict.fromkeys(f"{r['tau']:g} / {r['temperature']:g}" for r in runs)),
                *(percent(rights(runs, n)) for n in counts),
                gain,
                *(f"{100 * statistics.fmean(values):.1f}" if values else "" for values in figures),
            ]
        )
    heads = ["", "seeds", "τ / T", *(f"n = {n}" for n in counts), "over one model", "one output", f"pass@{counts[-1]}"]
    return table([*heads, "sure votes", "draws differ"], rows)


SHOWN = {
    "confidence": "share of the votes",
    "expected_entropy": "within models (expected entropy)",
    "mutual_information": "between models (mutual information)",
    "disagreement": "disagreement",
}


FIGURES = (("auroc", 100, 1), ("aurc", 1, 3), ("answered", 100, 1))  # and how they are written


def over_seeds(judged: Sequence[Mapping[str, float]], key: str, scale: float, digits: int) -> str:
    """Return a figure of `telling` and its standard error, averaged over seeds."""
    mean, error = (scale * statistics.fmean(one[name] for one in judged) for name in (key, f"{key}_se"))
    return f"{mean:.{digits}f} ± {error / math.sqrt(len(judged)):.{digits}f}"


def telling_table(records: Sequence[Mapping[str, Any]], suite: str) -> str:
    """Return how well each measure tells wrong choices, with the most outputs, for each method."""
    rows = []
    for name, runs in by_method(records, suite).items():
        for measure, label in SHOWN.items():
            own = [r["by_n"][str(SUITES[suite].counts[-1])]["telling"].get(measure) for r in runs]
            judged = [one for one in own if one and one["auroc"] is not None]
            if judged:
                rows.append([name, label, *(over_seeds(judged, *figure) for figure in FIGURES)])
    lines = table(["", "measure", "AUROC, %", "AURC", f"accuracy of the surest {COVERAGE:.0%}, %"], rows)
    return lines.replace("| --- | ---: |", "| --- | --- |", 1)


def utility_table(records: Sequence[Mapping[str, Any]], suite: str) -> str:
    """Return the accuracy of choices by other utilities than the vote, over the seeds that have them."""
    spec = SUITES[suite]
    n = min(spec.compared, spec.counts[-1])
    measured = [r for r in records if set(spec.utilities) <= set(r["utilities"])]
    rows = [
        [
            name,
            str(len(runs)),
            f"{100 * float(rights(runs, n).mean()):.1f}",
            *(f"{100 * statistics.fmean(r['utilities'][u] for r in runs):.1f}" for u in spec.utilities),
        ]
        for name, runs in by_method(measured, suite).items()
    ]
    return table([f"n = {n}", "seeds", "vote", *spec.utilities], rows)


TABLES = {"accuracy": accuracy_table, "telling": telling_table, "utilities": utility_table}


def fill(page: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with its tables made anew."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[3]](records, place[2]) + "\n" + place[4], page)


def draw(records: Sequence[Mapping[str, Any]], suite: str, folder: Path) -> None:
    """Draw figure 3 (a), the methods, and (b), the ways to prune."""
    methods = by_method(records, suite)
    curves = {
        name: [CurvePoint(n, *mean_and_error(rights(runs, n)), utility=0.0) for n in SUITES[suite].counts]
        for name, runs in methods.items()
    }
    parts = {
        "methods": [name for name in curves if METHODS[name].criterion in (None, "snr")],
        "pruning": [name for name in curves if name in PRUNED and not METHODS[name].tuned],
    }
    if parts["pruning"] == parts["methods"]:
        del parts["pruning"]
    for label, names in parts.items():
        if len(names) > 1:
            figure = scaling({name: curves[name] for name in names})
            figure.savefig(folder / f"testtime-{suite}-{label}.png", dpi=120)


def report(arguments: argparse.Namespace) -> None:
    """Print the tables, or put them into a page, and draw the pictures."""
    records = read_results(arguments.results)
    suites = [name for name in SUITES if by_method(records, name)]
    if arguments.page:
        arguments.page.write_text(fill(arguments.page.read_text(encoding="utf-8"), records), encoding="utf-8")
    else:
        for name in suites:
            kinds = [kind for kind in TABLES if kind != "utilities" or SUITES[name].utilities]
            print("\n\n".join([f"## {name}", *(TABLES[kind](records, name) for kind in kinds)]), end="\n\n")
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        for name in suites:
            draw(records, name, arguments.pictures)


@contextlib.contextmanager
def vllm(python: Path, adapter: Path, draws: int) -> Iterator[str]:
    """Serve the mean and draws of an adapter by vLLM, as `ivon-post sample --serve vllm` says; gives the URL."""
    ensemble, port = adapter.parent / "ensemble", free_port()
    sample = [*IVON_POST, "sample", str(adapter), "-n", str(draws), "--include-mean", "--serve", "vllm", "--quiet"]
    subprocess.run([*sample, "-o", str(ensemble)], check=True)
    own = {"PATH": f"{python.parent}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    here = f"--host 127.0.0.1 --port {port} --dtype float32 --max-model-len 1024 --enforce-eager".split()
    # A prompt that is read in parts ends vllm-cpu 0.32 where requests have a seed: a CPU generator has no offset.
    here += ["--max-num-batched-tokens", "16384"]
    words = ["sh", str(ensemble / "serve.sh"), *here]
    with running(["env", *(f"{name}={value}" for name, value in own.items()), *words], port, adapter.parent / "log"):
        yield f"http://127.0.0.1:{port}"


def speed(arguments: argparse.Namespace) -> None:
    """Print tokens per second of one model and of several draws in one batch, as many outputs of each.

    `generation.py` compares with other ways to run draws. The adapter over SmolLM2 is random. Without vLLM the seconds
    on a CPU are those of this process.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    folder, n, draws = arguments.work.parent / SMOLLM2, arguments.n, arguments.draws
    prepare(arguments.work, SMOLLM2)
    plan = Plan(n=n, per_model=n // draws, max_tokens=arguments.tokens)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40000, (arguments.prompts, arguments.length), generator=generator).tolist()
    prompts = [Prompt(str(own), own, None, "benchmark") for own in ids]
    with contextlib.ExitStack() as stack:
        adapter = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
        write_adapter(folder, adapter)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(adapter)
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
        model: Any = PeftModel.from_pretrained(base.to(arguments.device), adapter).eval()
        session, posterior = make_session(model, tokenizer), Posterior.from_pretrained(adapter)
        engines: dict[str, Engine] = {
            "one model": TransformersEngine(session, posterior, replace(plan, mean=True), batch_size=n),
            f"{draws} draws in one batch": TransformersEngine(session, posterior, plan, batch_size=n),
        }
        if arguments.vllm:
            url = stack.enter_context(vllm(arguments.vllm, adapter, draws))
            members = [f"sample-{number:04d}" for number in range(draws)]
            engines["one model, vLLM"] = EndpointEngine(url, ["mean"], replace(plan, mean=True))
            engines[f"{draws} draws, vLLM"] = EndpointEngine(url, members, plan)
        tokens = dict.fromkeys(engines, 0)

        def write(name: str) -> None:
            tokens[name] = sum(output.tokens for outputs in engines[name].outputs(prompts) for output in outputs)

        clock = time.process_time if arguments.device == "cpu" and not arguments.vllm else time.perf_counter
        times = evaluation.seconds(*(partial(write, name) for name in engines), repeats=arguments.repeats, clock=clock)
    speeds = {name: tokens[name] / own for name, own in zip(engines, times, strict=True)}
    rows = [[name, f"{own:.0f}", f"{own / speeds['one model']:.2f}"] for name, own in speeds.items()]
    print(f"{len(prompts)} prompts of {arguments.length} tokens, {n} outputs of {arguments.tokens} tokens each\n")
    print(table(["", "tokens per second", "× one model"], rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Test-time scaling: n outputs of draws and of one model.")
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train, write and vote what is missing")
    runs.add_argument("suites", nargs="*", default=[name for name in SUITES if name != QUICK])
    runs.add_argument("--quick", action="store_true", help="one seed of a small model, in an hour of one core")
    runs.add_argument("--methods", nargs="*", choices=METHODS, help="instead of all of the suite")
    runs.add_argument("--seeds", nargs="*", type=int, help="instead of those of the suite")
    runs.add_argument("--work", type=Path, default=Path(".demo/fidelity"), help="for data; beside it, the base models")
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--until", type=datetime.fromisoformat, help="start nothing after this time")
    runs.set_defaults(call=run)
    reports = commands.add_parser("report", help="print the tables and draw the pictures")
    reports.add_argument("--page", type=Path, help="put the tables into this page, at its marks, instead")
    reports.add_argument("--pictures", type=Path)
    reports.set_defaults(call=report)
    for command in (runs, reports):
        command.add_argument("--results", type=Path, default=Path("benchmarks/testtime.jsonl"))
    speeds = commands.add_parser("speed", help="tokens per second of one model and of several draws")
    speeds.add_argument("--n", type=int, default=64, help="outputs per prompt")
    speeds.add_argument("--draws", type=int, default=8)
    speeds.add_argument("--prompts", type=int, default=1)
    speeds.add_argument("--length", type=int, default=60, help="tokens of a prompt")
    speeds.add_argument("--tokens", type=int, default=64, help="tokens of an output")
    speeds.add_argument("--repeats", type=int, default=3)
    speeds.add_argument("--threads", type=int, default=1)
    speeds.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with vLLM, to compare with it")
    speeds.add_argument("--work", type=Path, default=Path(".demo/fidelity"), help="beside it, the base model")
    speeds.add_argument("--device", default="cpu")
    speeds.add_argument("--dtype", default="float32")
    speeds.set_defaults(call=speed)
    arguments = parser.parse_args()
    try:
        arguments.call(arguments)
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise SystemExit("reasoning-gym makes the problems: pip install 'axolotl-ivon[benchmarks]'") from None


if __name__ == "__main__":
    main()
