"""IVON-LoRA on a GPU: kernels, optimizer, training and draws, as one table. It needs no axolotl and no network.

    python -m benchmarks.gpu --model smollm2.gguf.a smollm2.gguf.b --output gpu.json   # at most 9 minutes
    python -m benchmarks.gpu --model .demo/SmolLM2-135M-Instruct --only training --steps 100
    python -m benchmarks.gpu --model FOLDER --device cpu --shapes 135m --steps 3 --length 32

`--model` is a folder in Hugging Face's format, or a GGUF file, also in several parts. Each section prints its table as
soon as it is done, and --output is written anew each time, so a run that is stopped keeps what it has. A section that
fails says so in its place, and the exit status is then 1. Training is on the pages of this repository: next-token
prediction in blocks of --length tokens, every tenth block held out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.optimizer import SHAPES, compare

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = "tests/optim/kernels/gpu_in_interpreter.py"
# Steps that are not timed: the first ones compile, choose algorithms and allocate.
WARMUP = 5
WAYS = ("AdamW", "IVON")
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "compile": {"torch_compile": True},
}

Rows = list[dict[str, Any]]


class Bench:
    """The options of the program, the base model's folder, and the clock of the whole run."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.end = time.monotonic() + 60 * options.minutes

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def synchronize(self) -> None:
        """Wait for what the device was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def base_folder(self) -> Path:
        """Return the base model's folder, converted from its GGUF the first time."""
        first, *rest = self.options.model
        if first.is_dir():
            return first
        folder = self.scratch / "base"
        if not (folder / "config.json").is_file():
            from example_configs.smollm2.prepare_demo import TOKENIZER, convert_model

            whole = self.scratch / "gguf" / "model.gguf"
            whole.parent.mkdir(exist_ok=True)
            with whole.open("wb") as joined:
                for part in (first, *rest):
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, joined)
            convert_model(whole, folder, TOKENIZER)
        return folder

    def base_model(self) -> Any:
        """Load the base model."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.base_folder(), dtype=self.dtype)
        return model.to(self.device)

    def blocks(self) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
        """Return the blocks of tokens to train on, and those held out."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base_folder())
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        ids = tokenizer("\n\n".join(page.read_text("utf-8") for page in pages), verbose=False)["input_ids"]
        length = self.options.length
        cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        rows = [{"input_ids": block, "labels": block} for block in cut]
        held_out = rows[::10]
        return [row for i, row in enumerate(rows) if i % 10], held_out[: self.options.held_out]


def run_kernel_tests(bench: Bench) -> Rows:
    """Run the tests of the fused kernels on the device; on a CPU, in Triton's interpreter."""
    environment = {**os.environ, "IVON_TEST_DEVICE": "cuda:0" if bench.device.type == "cuda" else "cpu"}
    if bench.device.type != "cuda":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "--tb=short", KERNEL_TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(60, bench.left())
    )
    outcomes = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return [{"tests": KERNEL_TESTS, "passed": outcomes.pop("passed", 0), "failed": sum(outcomes.values())}]


def time_optimizers(bench: Bench) -> Rows:
    """Time IVONLoRA's sample + step, AdamW fused and, where it is installed, ivon-opt."""
    rows = []
    for shape in bench.options.shapes:
        arguments = argparse.Namespace(
            device=bench.options.device,
            cpu_time=False,
            optimizers=["IVONLoRA", "ivon-opt", "AdamW fused"],
            repeats=bench.options.repeats,
        )
        result = compare(shape, arguments, bench.dtype)
        for name, row in result["optimizers"].items():
            rows.append(
                {
                    "shape": result["description"],
                    "optimizer": name,
                    "ms": row["ms"],
                    "× ivon-opt": row.get("x ivon-opt"),
                    "× AdamW fused": row.get("x AdamW fused"),
                    "launches": row["launches"],
                    "state, bytes a weight": row["state"],
                    "extra, bytes a weight": row["extra"],
                }
            )
    return rows


def clock_of(bench: Bench) -> Any:
    """Return a callback of the Trainer that keeps the milliseconds of every step and the losses."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            bench.synchronize()
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            bench.synchronize()
            self.steps.append(1000 * (time.perf_counter() - self.begun))

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                self.losses.append(kwargs["logs"]["loss"])

    return Clock()


def train(bench: Bench, way: str, setup: str, output: Path) -> dict[str, Any]:
    """Train one adapter, save it to `output`, and return its row of the table."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from axolotl_ivon import attach

    options, on_gpu = bench.options, bench.device.type == "cuda"
    torch.manual_seed(0)
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(bench.base_model(), lora)
    rows, held_out = bench.blocks()
    arguments = TrainingArguments(
        output_dir=str(output / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        bf16=bench.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **SETUPS[setup],
    )
    clock = clock_of(bench)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out, callbacks=[clock])
    trainer.remove_callback(type(next(x for x in trainer.callback_handler.callbacks if "Print" in type(x).__name__)))
    if way == "IVON":
        attach(trainer)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else math.nan
    nll = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output))
    timed = clock.steps[min(WARMUP, len(clock.steps) - 1) :]
    row = {
        "setup": setup,
        "optimizer": way,
        "ms a step": statistics.median(timed),
        "× AdamW": None,
        "peak MB": None if math.isnan(peak) else peak,
        "whole run, s": seconds,
        "loss, first quarter": statistics.mean(clock.losses[: max(1, options.steps // 4)]),
        "loss, last quarter": statistics.mean(clock.losses[-max(1, options.steps // 4) :]),
        "held-out NLL": nll,
    }
    del trainer, model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return row


def train_all(bench: Bench) -> Rows:
    """Train with AdamW and with IVON in each setup, as far as there is time."""
    rows: Rows = []
    longest = 0.0
    bench.base_folder()  # a GGUF takes half a minute, once
    for setup, way in itertools.product(bench.options.setups, WAYS):
        if bench.left() < 1.5 * longest:
            print(f"{setup}, {way}: left out, {bench.left():.0f} s are left", file=sys.stderr)
            continue
        begun = time.monotonic()
        try:
            rows.append(train(bench, way, setup, bench.scratch / f"{setup}-{way}"))
        except Exception as error:
            message = str(error).strip().splitlines() or [type(error).__name__]
            rows.append({"setup": setup, "optimizer": way, "failed": message[-1]})
        longest = max(longest, time.monotonic() - begun)
        same = [row for row in rows if row["setup"] == setup and "failed" not in row]
        if len(same) == len(WAYS):
            for row in same:
                row["× AdamW"] = row["ms a step"] / same[0]["ms a step"]
    return rows


def time_draws(bench: Bench) -> Rows:
    """Time the mean and draws of the trained posterior, and score both on the held-out blocks."""
    from peft import PeftModel

    from axolotl_ivon import Posterior
    from axolotl_ivon.models.draws import AdapterSlots, evaluating

    adapter = next((bench.scratch / f"{s}-IVON" for s in bench.options.setups if _is_trained(bench, s)), None)
    if adapter is None:
        adapter = bench.scratch / "plain-IVON"
        train(bench, "IVON", "plain", adapter)
    posterior = Posterior.from_pretrained(adapter)
    model = PeftModel.from_pretrained(bench.base_model(), adapter)
    slots = AdapterSlots(model)
    _, held_out = bench.blocks()
    n = bench.options.draws
    members = [posterior.draw(0, k) for k in range(n)]

    def nll(ids: torch.Tensor, groups: Sequence[Sequence[Any]]) -> float:
        """Return the mean NLL of a batch under the average prediction of all members."""
        summed: Any = 0.0
        for group in groups:
            with slots.drawn(group)():
                logits = model(input_ids=ids.repeat(len(group), 1)).logits.view(len(group), *ids.shape, -1)
            for of_one in logits[:, :, :-1]:
                target = ids[:, 1:, None]
                summed = summed + of_one.float().log_softmax(-1).gather(-1, target).double().exp()
        return -float((summed / sum(map(len, groups))).log().mean())

    ways = {
        "mean": [[dict(posterior.mean)]],
        f"{n} draws, one a pass": [[member] for member in members],
        f"{n} draws, all in a pass": [members],
    }
    rows: Rows = []
    for size in bench.options.prompts:
        ids = torch.tensor([row["input_ids"] for row in held_out[:size]], device=bench.device)
        with evaluating(model):
            times, scores = _in_turn(bench, {way: _call(nll, ids, groups) for way, groups in ways.items()})
        for way in ways:
            cost = times[way] / times["mean"]
            rows.append(
                {
                    "prompts": len(ids),
                    "prediction": way,
                    "ms": times[way],
                    "× mean": cost,
                    "× mean, a draw": cost / (1 if way == "mean" else n),
                    "tokens a second": 1000 * ids.numel() / times[way],
                    "NLL": scores[way],
                }
            )
    return rows


def _is_trained(bench: Bench, setup: str) -> bool:
    return (bench.scratch / f"{setup}-IVON" / "ivon_sigma.safetensors").is_file()


def _call(function: Callable[..., float], *arguments: Any) -> Callable[[], float]:
    return lambda: function(*arguments)


def _in_turn(bench: Bench, actions: dict[str, Callable[[], float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return each action's median milliseconds and its result; they take turns, after a round that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    results: dict[str, float] = {}
    for turn in range(bench.options.repeats + 1):
        for name, action in actions.items():
            bench.synchronize()
            begun = time.perf_counter()
            results[name] = action()
            bench.synchronize()
            if turn:
                times[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in times.items()}, results


SECTIONS: dict[str, tuple[str, Callable[[Bench], Rows]]] = {
    "kernels": ("The fused kernels' tests", run_kernel_tests),
    "optimizer": ("One optimizer step", time_optimizers),
    "training": ("Training", train_all),
    "draws": ("Draws at prediction", time_draws),
}


def as_markdown(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as a Markdown table, with the columns of all of them."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="a folder, or the parts of a GGUF file")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="write everything to this JSON file as well")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing that would take longer")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["3b", "7b"])
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--held-out", type=int, default=16, help="blocks to evaluate on, at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args(arguments)
    for path in options.model:
        if not path.exists():
            parser.error(f"--model {path}: there is no such file or folder")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here; --device cpu tries the program out")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print their tables, and return the exit status."""
    options = parse(arguments)
    on_gpu = options.device.startswith("cuda")
    device = torch.cuda.get_device_name(options.device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    document: dict[str, Any] = {
        "machine": f"{platform.machine()}, {device}, torch {torch.__version__}, Python {platform.python_version()}",
        "options": {name: value for name, value in vars(options).items() if name not in ("model", "output")},
        "sections": {},
    }
    print(f"{document['machine']}, {options.dtype}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        for name in options.only:
            title, run = SECTIONS[name]
            begun = time.monotonic()
            try:
                rows = run(bench)
            except Exception as error:
                rows = [{"failed": f"{type(error).__name__}: {error}"}]
            failed = failed or any(row.get("failed") for row in rows)
            seconds = time.monotonic() - begun
            document["sections"][name] = {"seconds": seconds, "rows": rows}
            print(f"\n## {title} ({seconds:.0f} s)\n\n{as_markdown(rows)}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
