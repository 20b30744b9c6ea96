"""Trains with axolotl many times for the price of one import: reads a YAML path a line, forks, writes how it ended."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from axolotl.cli.train import do_cli


def train(config: Path) -> int:
    """Train in a fork, with the output in a `.log` beside the YAML, and return its exit status."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.chdir(config.parent)
            log = os.open(config.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["axolotl"]
            do_cli(str(config))
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
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes to stdout
    for line in sys.stdin:
        print(train(Path(line.strip())), file=answers, flush=True)
