"""stdout is for results, whatever libraries print while a command works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PROCESS, READING, WRITING, fill, process
from tiny import write_chats

from axolotl_ivon import Posterior

# A library that prints: by `print`, to the file descriptor, from C (which keeps it for later), by a child, through
# the stream that it held on to, and when everything is over.
NOISY = """
import atexit, ctypes, os, subprocess, sys
import ivon_post
from ivon_post import _progress
held = sys.stdout
def noise():
    print("noise of print")
    os.write(1, b"noise of a descriptor\\n")
    ctypes.CDLL(None).printf(b"noise of C\\n")
    subprocess.run(["echo", "noise of a child"])
    held.write("noise of the first stream\\n")
def noisy(self, enter=_progress.Progress.__enter__):
    progress = enter(self)
    noise()
    return progress
_progress.Progress.__enter__ = noisy
"""
NOISY_MAIN = f"{NOISY}\natexit.register(noise)\nivon_post.main()\n"
# As a value; versions are text.
QUOTED_NUMBER = re.compile(r'(?<!version": )"(-?\d+(\.\d*)?(e[+-]?\d+)?|nan|-inf)"(?!:)')
KINDS = ("print", "a descriptor", "C", "a child", "the first stream")


def test_results_and_nothing_else(tiny_adapter: Path, tmp_path: Path) -> None:
    done = process("info", tiny_adapter, "--json", program=NOISY_MAIN, check=True)
    assert json.loads(done.stdout)["weights"] == Posterior.from_pretrained(tiny_adapter).mean.weights
    assert {kind: done.stderr.count(f"noise of {kind}\n") for kind in KINDS} == dict.fromkeys(KINDS, 2)
    done = process("temper", tiny_adapter, "--tau", 2, "-o", "out", program=NOISY_MAIN, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["τ is 2", "out"]
    assert "noise of C" in done.stderr


def test_every_command_prints_one_document(tiny_adapter: Path, other_adapter: Path, tmp_path: Path) -> None:
    """In one process, as torch takes long to import."""
    chats = write_chats(tmp_path / "chats.jsonl", 8)
    small = ["-n", 2, "--per-model", 1, "--max-tokens", 2]
    commands: list[list[object]] = [
        *(fill(words, tiny_adapter, other_adapter, name) for name, words in (READING | WRITING).items()),
        ["sample", tiny_adapter, "-n", 2, "--serve", "vllm", "-o", "ensemble"],
        ["eval", tiny_adapter, "-d", chats, "-n", 2],
        ["sweep", tiny_adapter, "-d", chats, "-n", 1, "--tau", "1,inf", "--ratio", 0, "-o", "sweep"],
        ["generate", tiny_adapter, "-p", chats, "--limit", 2, *small, "-o", "nbest.jsonl"],
        ["mbr", "nbest.jsonl", "-o", "chosen"],
        ["report", tiny_adapter, "-o", "report.html"],
        ["card", "temper"],
    ]
    loop = f"\nfor words in {[[*map(str, words), '--json'] for words in commands]!r}:\n"
    loop += "    ivon_post.cli(words, standalone_mode=False)\n"
    rest = process(program=NOISY + loop, cwd=tmp_path, check=True).stdout
    for words in commands:
        _, end = json.JSONDecoder().raw_decode(rest)
        assert not QUOTED_NUMBER.search(rest[:end]), words[0]
        rest = rest[end:].lstrip("\n")
    assert rest == ""


def test_a_caller_in_this_process_gets_stdout_back(tiny_adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ivon_post import cli

    before = sys.stdout
    cli(["info", str(tiny_adapter), "--json"], standalone_mode=False)
    assert sys.stdout is before
    assert json.loads(capfd.readouterr().out)["adapter"] == str(tiny_adapter)
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_a_reader_that_has_gone_is_no_traceback(tiny_adapter: Path) -> None:
    script = [*PROCESS, "info", str(tiny_adapter), "--json"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.close()
        assert "Traceback" not in run.stderr.read()
        assert run.wait() == 1
