"""Signals at random moments of a real axolotl run (see interrupts.py): 6 of them, or 200 with IVON_LONG=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = 200 if os.environ.get("IVON_LONG") == "1" else 6


@pytest.mark.timeout(7200)
def test_nothing_is_lost_or_mixed_up_whenever_a_run_is_interrupted() -> None:
    here = Path(__file__).parent
    command = [sys.executable, str(here / "interrupts.py"), "--moments", str(MOMENTS), "--seed", "1", "--jobs", "2"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{MOMENTS} moments, seed 1: 0 wrong" in done.stdout
