"""Memory and open files stay flat: a few hundred rounds, or tens of thousands with IVON_LONG=1."""

from __future__ import annotations

import gc
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import READING, WRITING, fill, process

from axolotl_ivon import IVONLoRA

LONG = os.environ.get("IVON_LONG") == "1"
ROUNDS = 20_000 if LONG else 400
OPERATIONS = 1_000 if LONG else 45
MIB = 2**20


def resident() -> int:
    """The memory of this process that is in use now, in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux'")


@linux
def test_sampling_and_stepping() -> None:
    """A leak of one tensor in each of 400 rounds would take 6 MiB."""
    params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(10)]
    optimizer = IVONLoRA(params, ess=1e4)

    def rounds(count: int) -> None:
        for _ in range(count):
            with optimizer.sampled_params():
                sum((param**2).sum() for param in params).backward()
            optimizer.step()
            optimizer.zero_grad()

    rounds(600)
    before, blocks = resident(), sys.getallocatedblocks()
    rounds(ROUNDS)
    gc.collect()
    assert sys.getallocatedblocks() - blocks < ROUNDS / 2  # of Python's memory, not one a round
    assert resident() - before < 4 * MIB


OPERATE = f"""
import gc, json, os, shutil, sys, threading
from click.testing import CliRunner
from ivon_post import cli
from pathlib import Path

{inspect.getsource(resident)}
"""
OPERATE += """
def state():
    gc.collect()  # CliRunner keeps an error, and what its frames held, in a cycle
    return len(os.listdir("/proc/self/fd")), threading.active_count()

commands = json.loads(sys.argv[2])
def operate(count):
    for i in range(count):
        words = commands[i % len(commands)]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == (words[1] == "damaged"), result.output
        shutil.rmtree("out", ignore_errors=True)

operate(45)
before, memory = state(), resident()
operate(int(sys.argv[1]))
assert state() == before, (state(), before)
print(resident() - memory)
"""


@linux
def test_operations_of_ivon_post(tiny_adapter: Path, other_adapter: Path, copied: Any) -> None:
    folder = copied(tiny_adapter).parent
    shutil.copytree(tiny_adapter, folder / "damaged")
    shutil.copytree(other_adapter, folder / "other")
    (folder / "damaged" / "ivon_sigma.safetensors").write_bytes(b"")
    commands = [*READING.values(), *(words for name, words in WRITING.items() if name != "merge")]
    filled = [fill(words, "adapter", "other", "out") for words in commands]
    filled += [["info", "adapter"], ["prune", "damaged"]]
    done = process(OPERATIONS, json.dumps(filled), program=OPERATE, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * MIB
