"""What `make demo` runs: prepare, train with axolotl, then evaluate the posterior; everything stays in `.demo`.

What an earlier run finished is reused as long as nothing that goes into it has changed. The demo fails if the posterior
mean does not beat the base model by `GAIN` points of accuracy on held-out snippets of the domain it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prepare_demo import DEMO, SETS, SMOLLM2, prepare, say

ROOT = DEMO.parent
CONFIG = Path(__file__).resolve().with_name("demo.yaml")
GAIN = 15  # points of accuracy
EVALUATED = [name for sizes in SETS.values() for name in sizes if name != "movie-train"]
ROWS = {"base": "base model", "mean": "posterior mean", "posterior": "average of 10 draws"}


def main() -> None:
    """Run the demo."""
    started = time.monotonic()
    os.chdir(ROOT)  # the paths in demo.yaml, and so in the adapter, start here
    heading("1/5  SmolLM2-135M-Instruct and the snippets")
    prepare()
    made_from = inputs()
    heading(f"2/5  axolotl train {CONFIG.relative_to(ROOT)}")
    train(DEMO / "adapter", made_from)
    heading("3/5  ivon-post info")
    run("ivon-post", "info", "--summary", ".demo/adapter")
    heading("4/5  ivon-post eval")
    rows = evaluate(DEMO / "evaluation.json", made_from)
    print_table(rows)
    heading("5/5  ivon-post sweep")
    sweep(DEMO / "sweep", made_from)
    say(f"Everything is in {DEMO}; this took {(time.monotonic() - started) / 60:.1f} minutes.")
    sys.exit(judge(rows))


def train(adapter: Path, made_from: str) -> None:
    """Train the adapter, unless an earlier run did from the same inputs."""
    record = DEMO / "trained.json"
    if is_made_from(record, made_from):
        say(f"{adapter} is there already, and nothing that it was trained from has changed.")
        return
    record.unlink(missing_ok=True)
    shutil.rmtree(adapter, ignore_errors=True)
    run("axolotl", "train", str(CONFIG.relative_to(ROOT)), "--launcher", "python")
    write(record, {"inputs": made_from})


def evaluate(record: Path, made_from: str) -> list[dict[str, Any]]:
    """Return the rows that `ivon-post eval` prints, from an earlier run if its inputs were the same."""
    if not is_made_from(record, made_from):
        data = [part for name in EVALUATED for part in ("--data", f".demo/data/{name}.jsonl")]
        printed = run(
            "ivon-post", "eval", ".demo/adapter", *data, "--rows", ",".join(ROWS), "--draws-per-pass", "5", "--json"
        )
        write(record, {"inputs": made_from, "rows": json.loads(printed)["rows"]})
    return json.loads(record.read_text(encoding="utf-8"))["rows"]


def sweep(folder: Path, made_from: str) -> None:
    """Try a few temperatures and pruning ratios, which draws two pictures, unless an earlier run did."""
    record = DEMO / "swept.json"
    if is_made_from(record, made_from):
        say(f"{folder} is there already, and nothing that it was made from has changed.")
        return
    record.unlink(missing_ok=True)
    grid = ("--tau", "0.25,1,inf", "--ratio", "0,0.3", "--samples", "3", "--limit", "30")
    run(
        "ivon-post",
        "sweep",
        ".demo/adapter",
        "--data",
        ".demo/data/movie.jsonl",
        *grid,
        "-o",
        ".demo/sweep",
        "--overwrite",
    )
    write(record, {"inputs": made_from})


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


def run(program: str, *arguments: str) -> str:
    """Run a program of this environment; return what it prints for `--json`, else let it print."""
    import torch

    settings = {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(DEMO / "cache"),
        # Threads that spin while they wait make a busy machine many times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not torch.cuda.is_available():
        settings["ACCELERATE_USE_CPU"] = "1"
    say(" ".join(["$", program, *arguments]))
    command = [str(Path(sys.executable).parent / program), *arguments]
    output = subprocess.PIPE if "--json" in arguments else None
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=output, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed with exit status {done.returncode}")
    return done.stdout


def heading(text: str) -> None:
    """Print the title of a step."""
    say(f"\n=== {text}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print accuracy and calibration, with standard errors, of each row on each set."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out movie snippets, and three domains it was not trained on", box=box.SIMPLE_HEAD)
    for column in ("snippets", "", "accuracy %", "ECE %", "NLL", "Brier"):
        table.add_column(column, justify="left" if column in ("snippets", "") else "right")
    for row in rows:
        first = row["name"] == next(iter(ROWS))
        if first:
            table.add_section()
        cells = [
            f"{scale * row[metric]:.{digits}f} ± {scale * row['se'][metric]:.{digits}f}"
            for metric, scale, digits in (("accuracy", 100, 1), ("ece", 100, 1), ("nll", 1, 3), ("brier", 1, 3))
        ]
        table.add_row(f"{Path(row['data']).stem} ({row['examples']})" if first else "", ROWS[row["name"]], *cells)
    Console(width=max(100, shutil.get_terminal_size().columns)).print(table)


def judge(rows: list[dict[str, Any]]) -> str | None:
    """Print how far the mean is ahead of the base model on the movie snippets; return the complaint if too little."""
    accuracy = {row["name"]: 100 * row["accuracy"] for row in rows if Path(row["data"]).stem == "movie"}
    gain = accuracy["mean"] - accuracy["base"]
    text = f"The posterior mean beats the base model by {gain:.1f} points of accuracy (at least {GAIN} are wanted)."
    if gain < GAIN:
        return text
    say(text)
    return None


if __name__ == "__main__":
    main()
