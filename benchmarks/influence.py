"""Which scores find wrong labels: `ivon-post influence` against the loss, the margin, and what watches the training.

    python -m benchmarks.influence                                  # the movie snippets, five seeds; resumable
    python -m benchmarks.influence --task wikihow-goal --bigbench DIR
    python -m benchmarks.influence --retrain loss sensitivity on --leave-out 30
    python -m benchmarks.influence cost                             # a pass against an epoch of training

A tenth of the labels of 512 training examples is flipped, SmolLM2-135M is trained on them by the fast path of the
fidelity suite (`causal-quick`, `ivon_preset: auto`), and every score ranks the examples, the most suspicious first.
Results go to a JSONL file, a line each, from which an interrupted run goes on; the tables are printed from it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from axolotl_ivon import IVONLoRA
from axolotl_ivon.data.chats import read_examples
from axolotl_ivon.data.encode import encode_turns
from axolotl_ivon.influence.attribution import log_odds_variance, products
from axolotl_ivon.metrics.auroc import auroc
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.models.batching import Batches
from axolotl_ivon.models.gradients import (
    ExampleGradients,
    adapter_parameters,
    exact_negative_log_likelihood,
    example_losses,
)
from axolotl_ivon.settings.presets import PRESETS

from .fidelity.causal import Causal
from .fidelity.data import Example, Task, collate, load_task, predict, prepare
from .fidelity.methods import Trained, train_ivon_auto
from .fidelity.run import HERE, append, read_results

FLIPPED = 0.1
IGNORED = -100  # `cross_entropy` takes no notice of such a label


class Watched(Causal):
    """Remembers the margin of every example each time that it is trained on."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.margins: dict[tuple[int, ...], list[float]] = defaultdict(list)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits."""
        logits = super().forward(batch)
        if self.training:
            for ids, label, values in zip(batch["input_ids"], batch["labels"], logits.detach(), strict=True):
                if label != IGNORED:
                    others = torch.cat([values[:label], values[label + 1 :]]).max()
                    self.margins[key(ids[ids != 0].tolist())].append(float(values[label] - others))
        return logits


def key(ids: Sequence[int]) -> tuple[int, ...]:
    """Return what a text is known by."""
    return tuple(ids)


def flip(examples: Sequence[Example], classes: int, seed: int) -> tuple[list[Example], list[int]]:
    """Give a tenth of the examples a wrong label; return all of them, and the numbers of those."""
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(examples)), round(FLIPPED * len(examples))))
    changed = list(examples)
    for i in chosen:
        wrong = rng.choice([label for label in range(classes) if label != examples[i].label])
        changed[i] = replace(examples[i], label=wrong)
    return changed, chosen


def train(make: Any, task: Task, settings: Mapping[str, Any]) -> Trained:
    """Train one model."""
    return train_ivon_auto(make(settings["seed"]), task, settings)


def quality(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return accuracy and NLL at the mean."""
    labels = torch.tensor([example.label for example in examples])
    found = metrics(Scores.of(predict(model, examples).softmax(-1), labels))
    return {name: float(found[name] or 0.0) for name in ("accuracy", "nll")}


def measure(trained: Trained, task: Task) -> dict[str, list[float]]:
    """Return every score of every training example; the higher, the more suspicious."""
    model: Any = trained.model
    parameters = model.trained()
    variance = {name: sigma.square() for name, sigma in dict(trained.posterior.sigma).items()}
    ones = {name: torch.ones_like(value) for name, value in variance.items()}
    held_out: dict[str, Tensor] = {}

    def losses(examples: Sequence[Example]) -> Tensor:
        batch = collate(examples)
        return F.cross_entropy(model(batch), batch["labels"], reduction="none")

    def mean_loss(sets: Sequence[Sequence[Example]]) -> Tensor:
        return torch.stack([losses(one).sum() / len(task.validation) for one in sets])

    def gather(name: str, first: int, some: Tensor) -> None:
        held_out[name] = held_out.get(name, 0) + some[0]

    batches = [task.validation[i : i + 16] for i in range(0, len(task.validation), 16)]
    with ExampleGradients(model, parameters, mean_loss) as whole:
        for batch in batches:
            whole([batch], gather)
    found: dict[str, list[float]] = defaultdict(list)
    weight = PRESETS["auto"].ess(len(task.train), sum(map(torch.numel, parameters.values()))) / len(task.train)
    with ExampleGradients(model, parameters, losses) as gradients:
        for example in task.train:  # texts lie one after another in a batch, which hooks do not know
            one = products(gradients, [example], variance, held_out)
            plain = products(gradients, [example], ones, held_out)  # TracIn: every σ the same
            assert one.along is not None
            assert plain.along is not None
            found["loss"].append(float(one.losses))
            found["leverage"].append(float(log_odds_variance(one.losses, one.own)))
            found["sensitivity"].append(weight * float(one.own))
            found["on"].append(-weight * float(one.along))
            found["TracIn, self"].append(float(plain.own))
            found["TracIn, on"].append(-float(plain.along))
    logits = predict(model, task.train)
    for example, values in zip(task.train, logits, strict=True):
        others = torch.cat([values[: example.label], values[example.label + 1 :]]).max()
        found["margin"].append(float(others - values[example.label]))
        watched = model.margins[key(example.ids)]
        found["AUM"].append(-sum(watched) / max(1, len(watched)))
        pairs = itertools.pairwise(watched)
        # Of those that were never right Toneva et al. say that they are forgotten infinitely often.
        events = sum(before > 0 >= after for before, after in pairs) if any(m > 0 for m in watched) else len(watched)
        found["forgetting"].append(float(events))
    return dict(found)


def worst(scores: Sequence[float], count: int) -> list[int]:
    """Return the numbers of the examples that a score flags."""
    return np.argsort(-np.asarray(scores), kind="stable")[:count].tolist()


def detection(scores: Mapping[str, Sequence[float]], flipped: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return AUROC, and precision among as many as were flipped, of every score."""
    count = len(next(iter(scores.values())))
    wrong = np.isin(np.arange(count), flipped)
    return {
        name: {
            "auroc": float(auroc(np.asarray(values), wrong)),
            "precision": float(wrong[worst(values, len(flipped))].mean()),
        }
        for name, values in scores.items()
    }


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return the rank of every value."""
    return np.argsort(np.argsort(np.asarray(values)))


def study(arguments: argparse.Namespace) -> None:
    """Run what the results file lacks."""
    suite = yaml.safe_load((HERE / "experiments.yaml").read_text(encoding="utf-8"))["suites"]["causal-quick"]
    spec = {**suite["tasks"].get(arguments.task, suite["tasks"]["movie-256"]), "train": arguments.train}
    spec = {name: value for name, value in spec.items() if name != "shifted"}
    base = arguments.folder.parent / suite["model"]
    prepare(arguments.folder, suite["model"])
    task = load_task(spec, arguments.folder, arguments.bigbench, suite["max_tokens"], base, causal=True)

    def make(seed: int) -> Watched:
        return Watched(base, task.choices, seed, suite["rank"], suite["targets"], suite["dropout"], suite["upper"])

    lower = make(0)
    clean = replace(
        task,
        train=lower.freeze(task.train),
        validation=lower.freeze(task.validation),
        test=lower.freeze(task.test),
    )
    settings = {"batch": suite["batch"], "warmup": suite["warmup"], "steps": arguments.steps}

    def known(**wanted: Any) -> dict[str, Any] | None:
        return next((r for r in read_results(arguments.out) if wanted.items() <= r.items()), None)

    def run(what: str, seed: int, train_on: Sequence[Example], **more: Any) -> Trained:
        begun = time.time()
        trained = train(make, replace(clean, train=list(train_on)), {**settings, "seed": seed})
        found = {
            **identity(seed),
            "what": what,
            **more,
            "test": quality(trained.model, clean.test),
            "train_seconds": trained.train_seconds,
            "wall_seconds": time.time() - begun,
        }
        trained.note["record"] = found
        return trained

    def identity(seed: int) -> dict[str, Any]:
        return {"task": arguments.task, "train": arguments.train, "steps": arguments.steps, "seed": seed}

    for seed in arguments.seeds:
        noisy, flipped = flip(clean.train, task.classes, seed)
        record = known(**identity(seed), what="scores")
        if record is None:
            trained = run("scores", seed, noisy, flipped=flipped)
            begun = time.process_time()
            scores = measure(trained, replace(clean, train=noisy))
            record = {
                **trained.note["record"],
                "score_seconds": time.process_time() - begun,
                "detection": detection(scores, flipped),
                "scores": {name: [float(f"{v:.5g}") for v in values] for name, values in scores.items()},
            }
            append(arguments.out, record)
            print(f"seed {seed}:", {n: round(d["auroc"], 3) for n, d in record["detection"].items()}, flush=True)
        for name in arguments.retrain:
            if known(**identity(seed), what="retrained", by=name) is None:
                if name == "truth":
                    gone = set(flipped)
                elif name == "random":
                    gone = set(random.Random(1000 + seed).sample(range(len(noisy)), len(flipped)))
                else:
                    gone = set(worst(record["scores"][name], len(flipped)))
                left = [example for i, example in enumerate(noisy) if i not in gone]
                append(arguments.out, run("retrained", seed, left, by=name).note["record"])
        if seed == arguments.seeds[0] and arguments.leave_out:
            leave_out(arguments, record, noisy, known, run, identity)


def leave_out(
    arguments: argparse.Namespace, record: Mapping[str, Any], noisy: Sequence[Example], known: Any, run: Any, who: Any
) -> None:
    """Train without one example, for examples over the whole range of the sensitivity; the batches stay as they are."""
    order = worst(record["scores"]["sensitivity"], len(noisy))
    seed = record["seed"]

    def loss(trained: Trained, i: int) -> float:
        return float(F.cross_entropy(predict(trained.model, [noisy[i]]), torch.tensor([noisy[i].label])))

    for i in order[:: max(1, len(order) // arguments.leave_out)][: arguments.leave_out]:
        if known(**who(seed), what="left out", index=i) is None:
            without = [replace(e, label=IGNORED) if j == i else e for j, e in enumerate(noisy)]
            trained = run("left out", seed, without, index=i)
            append(arguments.out, {**trained.note["record"], "loss": loss(trained, i)})


def cost(arguments: argparse.Namespace) -> None:
    """Time a pass over the rows, with and without a direction, against an epoch of training on them, in turn.

    All layers of SmolLM2-135M, LoRA r 8 on q and v, in float32; chats of the movie snippets in batches of 8.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = arguments.folder.parent / "SmolLM2-135M-Instruct"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).eval()
    examples = read_examples(arguments.folder.parent / "data" / "movie-train.jsonl", arguments.rows)
    items = encode_turns(AutoTokenizer.from_pretrained(base), examples)
    batches = Batches(items, 8, "cpu", 49152).once()
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = IVONLoRA(parameters.values(), lr=1e-3, ess=float(len(items)))
    variance = {name: optimizer.sigma(value).square() for name, value in parameters.items()}
    losses = functools.partial(example_losses, model, loss=exact_negative_log_likelihood)

    def epoch() -> None:
        for batch in batches:
            with optimizer.sampled_params():
                example_losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def influences(direction: Mapping[str, Tensor] | None = None) -> None:
        with ExampleGradients(model, parameters, losses) as gradients:
            for batch in batches:
                products(gradients, batch, variance, direction)

    runs: dict[str, Callable[[], None]] = {
        "an epoch of training": epoch,
        "influence": influences,
        "influence with a direction (`--on`, without its own pass)": functools.partial(influences, variance),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.repeats + 1):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            seconds[name].append(time.process_time() - begun)
    print(f"{len(items)} rows, median of {arguments.repeats} turns, CPU seconds of {arguments.threads} thread(s)\n")
    print("| | s | × an epoch |\n|---|---:|---:|")
    whole = float(np.median(seconds["an epoch of training"][1:]))
    for name, found in seconds.items():
        median = float(np.median(found[1:]))  # the first turn warms up
        print(f"| {name} | {median:.2f} | {median / whole:.2f} |")


def report(records: Sequence[Mapping[str, Any]]) -> None:
    """Print Markdown tables of all that is known."""
    scored = [r for r in records if r["what"] == "scores"]
    for task in dict.fromkeys((r["task"], r["train"], r["steps"]) for r in scored):
        runs = [r for r in scored if (r["task"], r["train"], r["steps"]) == task]
        print(f"\n{task[0]}, {task[1]} examples, a tenth flipped, {task[2]} steps, seeds: {len(runs)}\n")
        print("| score | AUROC | precision in the first 10 % |\n|---|---:|---:|")
        for name in runs[0]["detection"]:
            columns = ([100 * r["detection"][name][what] for r in runs] for what in ("auroc", "precision"))
            print(f"| {name} | " + " | ".join(map(spread, columns)) + " |")
        base = {r["seed"]: r["test"] for r in runs}
        print(f"\n| trained | accuracy % | NLL | seeds |\n|---|---:|---:|---:|\n{quality_row('on all', runs)}")
        again = [r for r in records if r["what"] == "retrained" and (r["task"], r["train"], r["steps"]) == task]
        for by in dict.fromkeys(r["by"] for r in again):
            some = [r for r in again if r["by"] == by]
            gain = spread([100 * (r["test"]["accuracy"] - base[r["seed"]]["accuracy"]) for r in some], "+")
            print(quality_row(f"without the tenth of {by} (accuracy {gain})", some))
        left = [r for r in records if r["what"] == "left out" and (r["task"], r["train"], r["steps"]) == task]
        if len(left) > 2:
            scores = next(r for r in runs if r["seed"] == left[0]["seed"])["scores"]
            real = [r["loss"] - scores["loss"][r["index"]] for r in left]
            for name in ("sensitivity", "loss", "TracIn, self"):
                predicted = [scores[name][r["index"]] for r in left]
                rho = np.corrcoef(ranks(real), ranks(predicted))[0, 1]
                print(f"\nleaving out {len(left)}: rank correlation of the change of their loss with {name}: {rho:.2f}")


def quality_row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a row of a table."""
    accuracy = spread([100 * r["test"]["accuracy"] for r in runs])
    nll = spread([r["test"]["nll"] for r in runs], digits=3)
    return f"| {name} | {accuracy} | {nll} | {len(runs)} |"


def spread(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """Return mean ± standard error, or of one seed what it is."""
    text = f"{np.mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def main() -> None:
    """Run the study, and print what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["study", "cost", "report"], default="study")
    parser.add_argument("--rows", type=int, default=48, help="of `cost`")
    parser.add_argument("--repeats", type=int, default=3, help="of `cost`")
    parser.add_argument("--folder", type=Path, default=Path(".demo/fidelity"), help="where models and data are")
    parser.add_argument("--out", type=Path, default=HERE.parent / "influence.jsonl")
    parser.add_argument("--task", default="movie", help="movie, or a task of causal-quick")
    parser.add_argument("--bigbench", type=Path)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--retrain", nargs="*", default=[], help="scores, truth or random, whose tenth is left out")
    parser.add_argument("--leave-out", type=int, default=0, help="examples of the first seed to train without")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "cost":
        cost(arguments)
        return
    if arguments.what == "study":
        study(arguments)
    report(read_results(arguments.out))


if __name__ == "__main__":
    main()
