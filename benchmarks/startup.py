"""What starting costs: the commands over bare Python, and the plugin over axolotl's own start.

    python benchmarks/startup.py [--repeats 7]

Every line is a process of its own, in turn; medians, and the median of the differences within a turn. What the plugin
adds is timed inside the process, after all that axolotl imports to train.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from commands import write_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table

IVON_POST = "import ivon_post; ivon_post.main()"
# What `axolotl train` imports with or without the plugin, and what the plugin does when it trains.
AXOLOTL = "import axolotl.cli.main, axolotl.cli.train, axolotl.train, axolotl.core.builders"
PLUGIN = "from axolotl_ivon import IVONLoRAPlugin; import axolotl_ivon.training.trainer"
ADDED = f"import time; {AXOLOTL}; started = time.perf_counter(); {PLUGIN}; print(time.perf_counter() - started)"


def seconds(words: list[str], environment: dict[str, str]) -> float:
    """Run Python with these arguments, and return how long it took, or for `ADDED` what it says itself."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words} failed: {done.stderr}")
    return float(done.stdout.split()[-1]) if ADDED in words else time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        write_adapter(adapter, 2)
        completing = {"_IVON_POST_COMPLETE": "bash_complete", "COMP_WORDS": "ivon-post pr", "COMP_CWORD": "1"}
        ways: dict[str, tuple[list[str], dict[str, str], str, str]] = {
            "python": (["-c", ""], {}, "", ""),
            "ivon-post --help": (["-c", IVON_POST, "--help"], {}, "python", "0.15"),
            "ivon-post pr<TAB>": (["-c", IVON_POST], completing, "python", "0.15"),
            "ivon-post info, 2 M weights": (["-c", IVON_POST, "info", str(adapter)], {}, "python", "1.0"),
            "the plugin, after axolotl": (["-c", ADDED], {}, "", "0.1"),
        }
        timed: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(repeats), "starting", console=Console(stderr=True), transient=True):
            for name, (words, environment, *_rest) in ways.items():
                timed[name].append(seconds(words, environment))
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} processors, medians of {repeats}, seconds")
    for column in ("", "takes", "more than", "by", "wanted at most"):
        table.add_column(column, justify="left" if column in ("", "more than") else "right")
    for name, (_, _, base, wanted) in ways.items():
        pairs = zip(timed[name], timed[base], strict=True) if base else ()
        more = f"{statistics.median(a - b for a, b in pairs):.2f}" if base else ""
        table.add_row(name, f"{statistics.median(timed[name]):.2f}", base, more, wanted)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
