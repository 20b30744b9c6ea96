"""Runs `axolotl` many times for the price of one import: reads a job a line (JSON), forks, writes how it ended.

A job is {"arguments", "cwd", "environments", "stdin", "logs"}: a process for each environment, with its stdout and
stderr in the files `<log>.out` and `<log>.err`. The answer is the list of their exit statuses.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

SECONDS = 300
# What every run imports before it reads a configuration or patches anything; nothing of axolotl_ivon.
IMPORTS = (
    "axolotl.cli.main",
    "axolotl.cli.config",
    "axolotl.cli.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.loaders",
    "axolotl.train",
    "bitsandbytes",
    "deepspeed",
    "numba",
)


def axolotl(job: dict[str, Any], rank: int) -> None:
    """Do what the process `axolotl ARGUMENTS` does."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environments"][rank])
    files = [os.open(job["stdin"], os.O_RDONLY)]
    files += [os.open(job["logs"][rank] + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for end in (".out", ".err")]
    for number, file in enumerate(files):
        os.dup2(file, number)
    signal.alarm(SECONDS)
    sys.argv = ["axolotl", *job["arguments"]]
    import_module("axolotl.cli.main").main()


def exit_after(work: Callable[[], object]) -> NoReturn:
    """Do the work of a fork and exit as a process of its own would."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict[str, Any]) -> list[int]:
    """Run the processes of a job; as under torchrun, the first that fails takes the others with it."""
    sys.stdout.flush()
    ranks = {}
    for rank in range(len(job["environments"])):
        child = os.fork()
        if not child:
            exit_after(partial(axolotl, job, rank))
        ranks[child] = rank
    statuses = [0] * len(ranks)
    while ranks:
        child, status = os.wait()
        if child in ranks:
            statuses[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
    return statuses


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes to stdout
    for name in IMPORTS:
        import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
