"""An ensemble's folder, and the vLLM command line that serves it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.generation.ensemble import Ensemble, served_rank
from axolotl_ivon.generation.plan import Plan
from axolotl_ivon.posterior.sample import EnsemblePlan, sample


def test_an_ensemble_without_the_mean(tiny_adapter: Path, tmp_path: Path) -> None:
    sample(Posterior.from_pretrained(tiny_adapter), tmp_path / "e", EnsemblePlan(1))
    with pytest.raises(IVONError, match="--include-mean"):
        Ensemble(tmp_path / "e").members(Plan(mean=True))


def test_sample_writes_the_command_that_serves(
    ivon_post: Cli, tiny_adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "en semble"
    found = ivon_post.json("sample", tiny_adapter, "-n", 2, "--include-mean", "--serve", "vllm", "-o", folder)
    words = shlex.split(found["serve"])
    names = ["mean", "sample-0000", "sample-0001"]
    assert words == [
        *("vllm", "serve", str(tiny_llama.resolve()), "--enable-lora", "--max-lora-rank", "8", "--max-loras", "3"),
        *("--generation-config", "vllm", "--lora-modules"),
        *(f"{name}={folder.resolve() / name}" for name in names),
    ]
    # Run with a `vllm` that prints its arguments.
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" vllm "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{Path(shutil.which('sh') or '/bin/sh').parent}:/usr/bin:/bin"}
    printed = subprocess.run(
        ["sh", found["serve_script"], "--port", "8001"], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == [*words, "--port", "8001"]
    lines = ivon_post("sample", tiny_adapter, "-n", 2, "--include-mean", "--serve", "vllm", "-o", folder, "--overwrite")
    assert lines.splitlines() == ["3 adapters, seed 0", str(folder), found["serve"], str(folder / "serve.sh")]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "serves no adapters with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "serves no adapters with modules_to_save"),
    ],
)
def test_what_vllm_does_not_serve_is_refused_before_anything_is_drawn(
    ivon_post: Cli, make_adapter: Callable[..., Path], tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    assert message in ivon_post.error("sample", make_adapter(**lora), "--serve", "vllm", "-o", tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_the_rank_is_one_that_vllm_takes() -> None:
    base = {"base_model_name_or_path": "x"}
    ranks = [served_rank({**base, "r": r}) for r in (1, 2, 8, 9, 64, 65, 512)]
    assert ranks == [1, 8, 8, 16, 64, 128, 512]
    assert served_rank({**base, "r": 8, "rank_pattern": {"q_proj": 40}}) == 64
    with pytest.raises(IVONError, match="up to rank 512; this one has 513"):
        served_rank({**base, "r": 513})
    with pytest.raises(IVONError, match="bias 'all'"):
        served_rank({**base, "r": 8, "bias": "all"})
    with pytest.raises(IVONError, match="names no base model"):
        served_rank({"r": 8})
