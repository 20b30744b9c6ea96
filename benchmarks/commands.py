"""What `ivon-post` costs on large adapters, beside `cp` of the bytes that it reads and writes, and the obvious script.

    python benchmarks/commands.py [--sizes 2 160 320] [--repeats 3] [--folder DIR]

Each command runs as a process of its own, start-up included, in turn with its `cp`; the table shows medians, the ratio
of time, and the peak of resident memory. `ivon-post` has what it writes on the disk before it reports success (fsync),
and `cp` leaves it in memory, so `cp` is timed with `sync` of what it wrote as well. The obvious way loads the
adapter by PEFT, changes it in torch and saves it: nothing is checked, and nothing is on the disk for certain.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from axolotl_ivon.noise import normals
from axolotl_ivon.posterior.posterior import Posterior
from axolotl_ivon.posterior.tensors import Spec, Tensors
from axolotl_ivon.storage.format import CONFIG_FILE, MEAN_FILE, SIGMA_FILE

Q_V = (("self_attn.q_proj", "d", "d"), ("self_attn.v_proj", "d", "kv"))
LINEAR = (
    *(("self_attn." + name, "d", "d") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("mlp.gate_proj", "d", "f"),
    ("mlp.up_proj", "d", "f"),
    ("mlp.down_proj", "f", "d"),
)
# Millions of weights: layers, rank, modules, widths.
MODELS: dict[int, tuple[int, int, Any, dict[str, int]]] = {
    2: (28, 8, Q_V, {"d": 3072, "kv": 1024}),  # r 8 on q and v of a 3 B model
    160: (32, 64, LINEAR, {"d": 4096, "f": 11008}),  # r 64 on every linear layer of a 7 B model
    320: (64, 64, LINEAR, {"d": 4096, "f": 11008}),
}


def write_adapter(folder: Path, millions: int, seed: int) -> Posterior:
    """Write an adapter of that size with random weights and σ."""
    layers, rank, modules, width = MODELS[millions]
    specs: dict[str, Spec] = {}
    for layer in range(layers):
        for name, inner, outer in modules:
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            specs[f"{prefix}.lora_A.weight"] = ("F32", (rank, width[inner]))
            specs[f"{prefix}.lora_B.weight"] = ("F32", (width[outer], rank))

    def weights(key: str) -> np.ndarray:
        shape = specs[key][1]
        return normals(shape[0] * shape[1], f"mean {seed}", key).reshape(shape) * np.float32(0.01)

    def sigma(key: str) -> np.ndarray:
        shape = specs[key][1]
        return np.abs(normals(shape[0] * shape[1], f"sigma {seed}", key)).reshape(shape) * np.float32(
            0.01
        ) + np.float32(1e-4)

    posterior = Posterior(
        Tensors(specs, weights), Tensors(specs, sigma), {"ess": "1e6"}, {"peft_type": "LORA", "r": rank}
    )
    posterior.save_pretrained(folder)
    return posterior


def run(*command: str) -> tuple[float, float]:
    """Run a process that must succeed, and return seconds and the peak of its resident memory in MB."""
    started = time.perf_counter()
    nothing = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    process = os.posix_spawnp(command[0], list(command), os.environ, file_actions=[nothing])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def obvious(command: str, adapter: Path, other: Path, target: Path) -> None:
    """Do what a command does as a script of ten lines would."""
    import torch
    from peft import load_peft_weights
    from safetensors.torch import load_file, save_file

    mean, sigma = load_peft_weights(str(adapter), device="cpu"), load_file(adapter / SIGMA_FILE)
    outputs: dict[str, dict[str, Any]] = {"": mean}
    if command == "prune":
        snr = torch.cat([(mean[key].abs() / sigma[key]).flatten() for key in mean])
        threshold = snr.kthvalue(round(0.1 * len(snr))).values
        for key, value in mean.items():
            low = value.abs() / sigma[key] <= threshold
            value[low], sigma[key][low] = 0.0, 0.0
    elif command == "temper":
        sigma = {key: value / math.sqrt(2) for key, value in sigma.items()}
    elif command == "sample":
        outputs = {
            f"sample-{k}": {key: m + sigma[key] * torch.randn_like(m) for key, m in mean.items()} for k in range(8)
        }
    else:
        means = mean, load_peft_weights(str(other), device="cpu")
        precisions = [{key: value**-2 for key, value in q.items()} for q in (sigma, load_file(other / SIGMA_FILE))]
        total = {key: sum(p[key] for p in precisions) for key in mean}
        for key in mean:
            mean[key] = sum(m[key] * p[key] for m, p in zip(means, precisions, strict=True)) / total[key]
        sigma = {key: value**-0.5 for key, value in total.items()}
    for name, weights in outputs.items():
        folder = target / name
        folder.mkdir(parents=True)
        shutil.copy(adapter / CONFIG_FILE, folder)
        save_file(weights, folder / MEAN_FILE)
    if "" in outputs:
        save_file(sigma, target / SIGMA_FILE)


def measure(adapter: Path, other: Path, work: Path, repeats: int, console: Console) -> list[list[str]]:
    """Return the rows of the table for one adapter."""
    ivon_post = (sys.executable, "-c", "import ivon_post; ivon_post.main()")
    target = work / "out"
    copy = f"cp -r {adapter} {target}"
    mean, sigma = adapter / MEAN_FILE, adapter / SIGMA_FILE
    members = f"mkdir {target}; cat {sigma} > /dev/null; for k in 1 2 3 4 5 6 7 8; do cp {mean} {target}/$k; done"
    three = f"{copy}; cat {other}/*.safetensors > /dev/null"
    commands = {
        "prune --ratio 0.1": (["prune", "--ratio", "0.1", str(adapter)], copy),
        "temper --tau 2": (["temper", "--tau", "2", str(adapter)], copy),
        "sample -n 8": (["sample", "-n", "8", str(adapter)], members),
        "combine": (["combine", str(adapter), str(other)], three),
    }
    rows = []
    for name, (words, shell) in commands.items():
        timed: dict[str, list[tuple[float, float]]] = {"ours": [], "cp": [], "cp + sync": [], "obvious": []}
        script = (sys.executable, __file__, "--obvious", words[0], str(adapter), str(other), str(target))
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "ours": partial(run, *ivon_post, *words, "-o", str(target), "--quiet"),
            "cp": partial(run, "sh", "-c", shell),
            "cp + sync": partial(run, "sh", "-c", f"{shell}; find {target} -type f | xargs sync"),
            "obvious": partial(run, *script),
        }
        for _ in track(range(repeats), name, console=console, transient=True):
            for way, work_once in ways.items():
                timed[way].append(work_once())
                shutil.rmtree(target)
        seconds = {way: statistics.median(t for t, _ in results) for way, results in timed.items()}
        memory = {way: max(m for _, m in timed[way]) for way in ("ours", "obvious")}
        rows.append(
            [
                name,
                *(f"{seconds[way]:.2f}" for way in timed),
                f"{seconds['ours'] / seconds['cp']:.1f}",
                f"{seconds['ours'] / seconds['cp + sync']:.1f}",
                f"{seconds['ours'] / seconds['obvious']:.2f}",
                *(f"{peak:,.0f}" for peak in memory.values()),
            ]
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(MODELS), default=[160], help="millions of weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to work; needs 15 GB for 160 million weights")
    parser.add_argument("--obvious", nargs=4, metavar=("COMMAND", "ADAPTER", "OTHER", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.obvious:
        obvious(arguments.obvious[0], *map(Path, arguments.obvious[1:]))
        return
    errors = Console(stderr=True)
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} processors, medians of {arguments.repeats}, seconds")
    columns = ("ivon-post", "cp", "cp + sync", "obvious", "× cp", "× cp + sync", "× obvious", "peak MB", "its peak MB")
    for column in ("weights", "command", *columns):
        table.add_column(column, justify="left" if column == "command" else "right")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        for millions in arguments.sizes:
            adapter, other = Path(work) / "adapter", Path(work) / "other"
            weights = write_adapter(adapter, millions, 0).mean.weights
            write_adapter(other, millions, 1)
            os.sync()
            for row in measure(adapter, other, Path(work), arguments.repeats, errors):
                table.add_row(f"{weights:,}", *row)
            shutil.rmtree(adapter)
            shutil.rmtree(other)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
