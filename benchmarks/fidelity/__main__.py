"""Does IVON-LoRA give what the paper promises? Its tables, small enough to run, against its peers.

    python -m benchmarks.fidelity run causal --bigbench DIR  # on a CPU; again to go on (causal-quick: half an hour)
    python -m benchmarks.fidelity report causal              # tables and pictures of what has finished
    python -m benchmarks.fidelity write                      # the tables in README.md and RESULTS.md, made anew
    python -m benchmarks.fidelity configs paper --out DIR    # axolotl YAMLs and the commands of the other suites

The experiments are in `experiments.yaml`, the results in `results.jsonl.gz`: a line for each evaluated row of each run.
A run is identified by all that decides its outcome, so nothing is computed twice, and trained weights are kept in
the work folder. DIR holds BIG-bench tasks as TASK.train.jsonl and TASK.validation.jsonl, chat messages with a
lettered answer.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

import yaml

from example_configs.smollm2.prepare_demo import DEMO

from .run import Places, current_commit, read_results, run

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parents[1] / "README.md", HERE.parent / "RESULTS.md")


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "report", "write", "configs"])
    parser.add_argument("suite", nargs="?", default="encoder", help="causal, causal-quick, encoder (default) …")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl.gz")
    parser.add_argument("--work", type=Path, default=DEMO / "fidelity", help="for what can be remade")
    parser.add_argument("--bigbench", type=Path, help="folder of the BIG-bench tasks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--until", metavar="HH:MM", help="start no job after this time of today")
    parser.add_argument("--out", type=Path, help="folder of the pictures (report) or the YAMLs (configs)")
    arguments = parser.parse_args()
    suites = yaml.safe_load(arguments.experiments.read_text(encoding="utf-8"))["suites"]
    if arguments.suite not in suites:
        raise SystemExit(f"suite {arguments.suite!r}: {arguments.experiments.name} has {', '.join(suites)}")
    suite = suites[arguments.suite]
    if arguments.command == "write":
        from .page import fill, knobs, learning_curves
        from .report import Results

        records = read_results(arguments.results)
        for page in PAGES:
            page.write_text(fill(page.read_text(encoding="utf-8"), suites, records), encoding="utf-8")
        results = Results(suites["causal"], records)
        figures = {
            "causal-curves": learning_curves(results, "ivon-adam", "usual"),
            "causal-long-curves": learning_curves(Results(suites["causal-long"], records), "ivon-auto", "nll"),
            "causal-knobs": knobs(results),
        }
        for name, figure in figures.items():
            figure.savefig(HERE.parent / "pictures" / f"{name}.png", dpi=110)
    elif arguments.command == "report":
        from .report import report

        print(report(suite, read_results(arguments.results), arguments.out or HERE.parent / "pictures"))
    elif arguments.command == "configs":
        from .configs import write_configs

        for line in write_configs(suite, arguments.out or Path("outputs") / arguments.suite, arguments.bigbench):
            print(line)
    elif "tasks" not in suite or "stages" not in suite:
        raise SystemExit(f"suite {arguments.suite!r} is trained by axolotl: see `configs {arguments.suite}`")
    else:
        from .data import prepare

        prepare(arguments.work, suite.get("model"))
        until = None
        if arguments.until:
            until = datetime.combine(datetime.now(), datetime.strptime(arguments.until, "%H:%M").time())
        sizes = json.dumps(suite["tasks"], sort_keys=True)
        places = Places(arguments.work, arguments.bigbench, arguments.results, current_commit(), suite["draws"], sizes)
        run(suite, places, arguments.workers, until)


if __name__ == "__main__":
    main()
