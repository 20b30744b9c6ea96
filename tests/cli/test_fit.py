"""`ivon-post fit` as a user calls it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Cli
from tiny import write_chats

from axolotl_ivon import Posterior
from axolotl_ivon.fitting import ivon

MEAN_FILE = "adapter_model.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "train.jsonl", count=24)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivon, "FEWEST", 8)
    monkeypatch.setattr(ivon, "MOST", 16)


@pytest.mark.parametrize("method", ["ivon", "fisher", "tfb"])
def test_every_command_reads_it(plain_adapter: Path, data: Path, tmp_path: Path, ivon_post: Cli, method: str) -> None:
    out = tmp_path / "out"
    result = ivon_post.run("fit", plain_adapter, "--data", data, "--method", method, "-o", out)
    assert result.exit_code == 0, result.output
    line, written = result.stdout.splitlines()
    weights = 512 if method == "tfb" else 896
    assert line.startswith(f"σ of {weights} weights by {method}: median ")
    assert written == str(out)
    assert result.stderr.splitlines()[-1] == f"next: ivon-post eval {out} --data TEST.jsonl"
    assert (out / MEAN_FILE).read_bytes() == (plain_adapter / MEAN_FILE).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.jsonl"]
    assert ivon_post.json("info", out)["header"]["fit_method"] == method
    assert ivon_post.json("check", out)["findings"]
    ivon_post("prune", out, "--ratio", 0.2, "-o", tmp_path / "pruned")
    ivon_post("temper", out, "--tau", 2, "-o", tmp_path / "cool")
    ivon_post("sample", out, "-n", 1, "-o", tmp_path / "ensemble")
    rows = ivon_post.json("eval", out, "--data", data, "--rows", "mean,posterior", "-n", 2)["rows"]
    assert [row["name"] for row in rows] == ["mean", "posterior"]


def test_json_and_combined_posteriors(plain_adapter: Path, data: Path, tmp_path: Path, ivon_post: Cli) -> None:
    fisher, other = tmp_path / "fisher", tmp_path / "ivon"
    document = ivon_post.json("fit", plain_adapter, "-d", data, "--method", "fisher", "--ess", 1000, "-o", fisher)
    assert (document["output"], document["weights"]) == (str(fisher), 896)
    assert (document["header"]["ess"], document["header"]["train_size"]) == (1000, 24)
    assert document["header"]["mean_sha256"] == Posterior.from_pretrained(fisher).metadata["mean_sha256"]
    (tmp_path / "more").mkdir()
    more = write_chats(tmp_path / "more" / data.name, 24, seed=7)
    ivon_post("fit", plain_adapter, "-d", more, "--method", "ivon", "-o", other)
    ivon_post("combine", fisher, other, "-o", tmp_path / "both")
    assert ivon_post.json("diff", fisher, other)
    assert Posterior.from_pretrained(tmp_path / "both").metadata["fit_data"] == "train.jsonl"
    ivon_post("fit", plain_adapter, "-d", data, "--method", "ivon", "-o", tmp_path / "again")
    assert "hold the same data" in ivon_post.error("combine", fisher, tmp_path / "again", "-o", tmp_path / "none")


def test_defaults_and_progress(plain_adapter: Path, data: Path, copied: Callable[[Path], Path], ivon_post: Cli) -> None:
    folder = copied(plain_adapter)
    result = ivon_post.run("fit", folder, "-d", data, "--method", "ivon")
    assert result.stdout.splitlines()[-1] == str(folder.parent / "adapter-fitted")
    assert "steps: σ changed by " in result.stderr
    quiet = ivon_post.run("fit", folder, "-d", data, "-q", "--overwrite")
    assert quiet.stderr == ""
    assert "exists; choose another name, or overwrite it with --overwrite" in ivon_post.error("fit", folder, "-d", data)
    ivon_post("fit", folder.parent / "adapter-fitted", "-d", data, "-o", folder.parent / "again")


def test_an_interrupted_process_goes_on(
    plain_adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ivon_post: Cli
) -> None:
    """Ctrl-C in the middle leaves nothing but the hidden file, from which the same command goes on."""
    script = """
import signal, sys, time, ivon_post
from axolotl_ivon.fitting import ivon
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore
ivon.MOST, ivon.SETTLED, write = 32, 0, sys.stderr.write
def write_and_wait(text):  # for the signal
    write(text), sys.stderr.flush()
    time.sleep(60 * ("steps: σ changed" in text))
sys.stderr.write = write_and_wait
ivon_post.main()"""
    words = ["fit", str(plain_adapter), "-d", str(data), "--method", "ivon", "--limit", "8"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words, "-o", "out"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any("steps: σ changed" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.fit", "train.jsonl"]
    monkeypatch.setattr(ivon, "MOST", 32)
    monkeypatch.setattr(ivon, "SETTLED", 0)
    monkeypatch.chdir(tmp_path)
    ivon_post(*words, "-o", "out")
    ivon_post(*words, "-o", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.jsonl", "whole"]
    out, whole = (Posterior.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    assert out.metadata["fit_steps"] == whole.metadata["fit_steps"] == "32"
    for key, value in whole.sigma.items():
        torch.testing.assert_close(out.sigma[key], value, rtol=1e-4, atol=0)
