"""What `make demo` runs: AdamW and IVON-LoRA on the same little data, at the same cost; everything stays in `.demo`.

The log of a training goes into `.demo/train-NAME.log`, its loss to the screen.
What an earlier run finished is reused as long as nothing that goes into it has changed. The demo fails if the average
of the draws does not beat the base model by `GAIN` points of accuracy on held-out snippets, or AdamW in NLL and
calibration error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prepare_demo import DEMO, SMOLLM2, prepare, say

ROOT = DEMO.parent
CONFIG = Path(__file__).resolve().with_name("demo.yaml")
GAIN = 15  # points of accuracy
SURE = 0.9  # from this confidence on an error is called a confident one
DRAWS = 8
OPTIMIZERS = {"adamw": "adamw_torch", "ivon": "ivon_lora"}
# The lines of demo.yaml that change where the CPU multiplies bfloat16 in hardware: half of the time of a step.
FAST = {
    "bf16: false": "bfloat16: true",
    "plugins: [axolotl_ivon.IVONLoRAPlugin]": "plugins: [axolotl_ivon.IVONLoRAPlugin, bfloat16_on_cpu.BFloat16OnCPU]",
}
# (adapter, row of `ivon-post eval`) of every line of the table, and its name.
LINES = {
    ("ivon", "base"): "base model",
    ("adamw", "mean"): "AdamW",
    ("adamw", "mean+temperature"): "AdamW, softmax temperature",
    ("ivon", "mean"): "IVON-LoRA, mean",
    ("ivon", "mean+temperature"): "IVON-LoRA, mean, softmax temperature",
    ("ivon", "posterior"): f"IVON-LoRA, average of {DRAWS} draws",
    ("ivon", "posterior+temperature"): "the same, softmax temperature",
}


def main() -> None:
    """Run the demo."""
    started = time.monotonic()
    os.chdir(ROOT)  # the paths in demo.yaml, and so in the adapters, start here
    heading("1/4  SmolLM2-135M-Instruct and the snippets")
    prepare()
    made_from = inputs()
    for number, (name, optimizer) in enumerate(OPTIMIZERS.items(), start=2):
        heading(f"{number}/4  axolotl train, optimizer: {optimizer}")
        train(name, made_from)
    heading("4/4  ivon-post eval")
    rows = {name: evaluate(name, made_from) for name in OPTIMIZERS}
    lines = {(name, row["name"]): row for name in rows for row in rows[name]}
    print_table(lines)
    say(f"The picture: {draw(DEMO / 'confident-errors.png')}")
    say(f"Everything is in {DEMO}; this took {(time.monotonic() - started) / 60:.1f} minutes.")
    say(
        "Next: ivon-post check .demo/ivon says how the run went, and ivon-post serve .demo/ivon answers your questions."
    )
    sys.exit(judge(lines))


def train(name: str, made_from: str) -> None:
    """Train one adapter, unless an earlier run did from the same inputs: only the optimizer differs."""
    record, adapter = DEMO / f"trained-{name}.json", DEMO / name
    if is_made_from(record, made_from):
        say(f"{adapter} is there already, and nothing that it was trained from has changed.")
        return
    record.unlink(missing_ok=True)
    shutil.rmtree(adapter, ignore_errors=True)
    changes = [] if name == "ivon" else ["--optimizer", OPTIMIZERS[name], "--output-dir", f".demo/{name}"]
    run("axolotl", "train", str(config()), "--launcher", "python", *changes, log=DEMO / f"train-{name}.log")
    write(record, {"inputs": made_from})


def evaluate(name: str, made_from: str) -> list[dict[str, Any]]:
    """Return the rows that `ivon-post eval` prints of an adapter, from an earlier run if its inputs were the same."""
    record = DEMO / f"evaluation-{name}.json"
    if not is_made_from(record, made_from):
        options = ("--samples", str(DRAWS), "--dtype", frozen_dtype(), "--json")
        output = ("--output", f".demo/examples-{name}.jsonl", "--overwrite")
        # IVON-LoRA's run wrote its softmax temperatures beside the adapter; AdamW's is fitted on the same snippets.
        fitted = ("--rows", "mean", "--calibrate", ".demo/data/movie-validation.jsonl") if name == "adamw" else ()
        data = ("--data", ".demo/data/movie.jsonl")
        printed = run("ivon-post", "eval", f".demo/{name}", *data, *fitted, *options, *output)
        write(record, {"inputs": made_from, "rows": json.loads(printed)["rows"]})
    return json.loads(record.read_text(encoding="utf-8"))["rows"]


def config() -> Path:
    """Return the YAML to train from: `demo.yaml`, or a copy for a CPU that is fast in bfloat16."""
    import torch

    if torch.cuda.is_available() or frozen_dtype() == "float32":
        return CONFIG.relative_to(ROOT)
    text = CONFIG.read_text(encoding="utf-8")
    for line, instead in FAST.items():
        if line not in text:
            raise SystemExit(f"{CONFIG.name} has no line {line!r}, which this CPU would replace by {instead!r}")
        text = text.replace(line, instead)
    copy = DEMO / "demo-bfloat16.yaml"
    copy.write_text(text, encoding="utf-8")
    return Path(os.path.relpath(copy, ROOT))


def frozen_dtype() -> str:
    """Return bfloat16 where the CPU multiplies it in hardware, which is three times as fast as float32."""
    import torch

    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def inputs() -> str:
    """Return a digest of all that training and evaluation depend on."""
    files = [CONFIG, *sorted((DEMO / "data").iterdir()), *sorted((ROOT / "axolotl_ivon").rglob("*.py"))]
    packages = [f"{name} {version(name)}" for name in ("axolotl", "torch", "transformers", "peft")]
    parts = [SMOLLM2.sha256.encode(), *(file.read_bytes() for file in files), *map(str.encode, packages)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def is_made_from(record: Path, made_from: str) -> bool:
    """Return whether an earlier run wrote `record` for these inputs."""
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["inputs"] == made_from


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON at once or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2), encoding="utf-8")
    scratch.replace(path)


def run(program: str, *arguments: str, log: Path | None = None) -> str:
    """Run a program of this environment and return its output; with `log` it goes there, and the loss is printed."""
    import torch

    settings = {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(DEMO / "cache"),
        "PYTHONPATH": os.pathsep.join([str(CONFIG.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Threads that spin while they wait make a busy machine many times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc gives large tensors back at once, and faults their pages in anew: a tenth of a step.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    if not torch.cuda.is_available():
        settings["ACCELERATE_USE_CPU"] = "1"
    say(" ".join(["$", program, *arguments]))
    command = [str(Path(sys.executable).parent / program), *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if log else None}
    with subprocess.Popen(command, env={**os.environ, **settings}, **streams, text=True, errors="replace") as process:
        assert process.stdout is not None
        printed = show_loss(process.stdout, log) if log else process.stdout.read()
    if process.returncode:
        last = "".join(line for line in printed.splitlines(keepends=True)[-30:] if line.strip()) if log else ""
        raise SystemExit(
            f"{last}{program} failed with exit status {process.returncode}" + (f"; see {log}" if log else "")
        )
    return printed


def show_loss(lines: Iterable[str], log: Path) -> str:
    """Write the lines into `log` and return them; print the loss that the Trainer logs, and how the run calibrated."""
    printed = []
    with log.open("w", encoding="utf-8") as file:
        for line in lines:
            printed.append(line)
            file.write(line)
            file.flush()
            if match := re.search(r"\{'loss': '?([\d.]+).*'epoch': '?([\d.]+)", line):
                say(f"epoch {float(match[2]):4.1f}   loss {float(match[1]):.3f}")
            elif match := re.search(r"calibrated on .*", line):
                say(match[0])
    return "".join(printed)


def heading(text: str) -> None:
    """Print the title of a step."""
    say(f"\n=== {text}")


def print_table(lines: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Print accuracy and calibration, with standard errors."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    examples = next(iter(lines.values()))["examples"]
    table = Table(title=f"{examples} held-out movie snippets", box=box.SIMPLE_HEAD)
    for column in ("", "accuracy %", "ECE %", "NLL", "Brier"):
        table.add_column(column, justify="left" if not column else "right")
    for line, title in LINES.items():
        if not (row := lines.get(line)):
            continue  # of a softmax temperature of 1
        cells = [
            f"{scale * row[metric]:.{digits}f} ± {scale * row['se'][metric]:.{digits}f}"
            for metric, scale, digits in (("accuracy", 100, 1), ("ece", 100, 1), ("nll", 1, 3), ("brier", 1, 3))
        ]
        table.add_row(title, *cells)
    Console(width=max(100, shutil.get_terminal_size().columns)).print(table)


def answers(line: tuple[str, str]) -> list[tuple[float, bool]]:
    """Return (confidence, whether it is right) of every answer of one line of the table."""
    text = (DEMO / f"examples-{line[0]}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(example)["rows"][line[1]] for example in text.splitlines()]
    return [(row["confidence"], row["right"]) for row in rows]


def draw(path: Path) -> Path:
    """Draw which share of the answers that each is sure of is wrong, and how many of all it is sure of."""
    from matplotlib.figure import Figure

    from axolotl_ivon.plots.style import BLUE, VERMILION

    compared = [("adamw", "mean"), ("adamw", "mean+temperature"), ("ivon", "posterior")]
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    shares = []
    for place, line in enumerate(compared):
        answered = answers(line)
        sure = [right for confidence, right in answered if confidence >= SURE]
        wrong = len(sure) - sum(sure)
        shares.append(100 * wrong / len(sure) if sure else 0.0)
        axes.barh(place, shares[-1], color=VERMILION if line[0] == "adamw" else BLUE, height=0.6)
        label = f"{shares[-1]:.0f} % wrong\n{wrong} of the {len(sure)} that it is sure of, of {len(answered)}"
        axes.annotate(
            label if sure else f"never so sure, in {len(answered)} answers",
            (shares[-1], place), (6, 0), textcoords="offset points", va="center", fontsize=10,
        )  # fmt: skip
    axes.set_yticks(range(len(compared)), [LINES[line].replace(", ", ",\n") for line in compared], fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 2.2 * max([*shares, 5.0]))  # the labels stand beside the bars
    axes.set_xlabel("wrong answers, % of those that it is sure of")
    axes.set_title(f"How often it is wrong when it says that it is {SURE:.0%} sure or more")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def judge(lines: dict[tuple[str, str], dict[str, Any]]) -> str | None:
    """Print what was promised and came true; return the complaint about what did not."""
    base, adamw, draws = (lines[line] for line in (("ivon", "base"), ("adamw", "mean"), ("ivon", "posterior")))
    gain = 100 * (draws["accuracy"] - base["accuracy"])
    text = (
        f"The average of the draws beats the base model by {gain:.1f} points of accuracy (at least {GAIN} are wanted)."
    )
    if gain < GAIN:
        return text
    say(text)
    for metric, title in (("nll", "NLL"), ("ece", "ECE")):
        text = f"Its {title} is {draws[metric]:.3f}, AdamW's {adamw[metric]:.3f}"
        if draws[metric] >= adamw[metric]:
            return f"{text}: it should be lower."
        say(f"{text}.")
    return None


if __name__ == "__main__":
    main()
