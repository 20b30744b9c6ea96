"""`ivon-post fit` as a user calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli
from tiny import write_chats

from axolotl_ivon import Posterior
from axolotl_ivon.fitting import ivon
from axolotl_ivon.models.gradients import ExampleGradients

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
    result = ivon_post.done("fit", plain_adapter, "--data", data, "--method", method, "-o", out)
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


def test_an_interrupted_fit_goes_on(
    plain_adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ivon_post: Cli
) -> None:
    """Ctrl-C leaves nothing but the hidden file, from which the same command goes on."""
    gradients, calls, limit = ExampleGradients.__call__, 0, 6

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        return gradients(*args, **kwargs)

    monkeypatch.setattr(ExampleGradients, "__call__", interrupted)
    words = ["fit", plain_adapter, "-d", data, "--method", "ivon", "-o", tmp_path / "out"]
    assert ivon_post.run(*words).exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.fit", "train.jsonl"]
    ivon_post(*words)
    resumed, calls, limit = calls - 1, 0, 0
    ivon_post(*words[:-1], tmp_path / "whole")
    assert calls == resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.jsonl", "whole"]
    out, whole = (Posterior.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(out.sigma[key], sigma) for key, sigma in whole.sigma.items())


@pytest.mark.parametrize("method", ["ivon", "fisher", "tfb"])
def test_the_folders_above_the_target_are_made(
    plain_adapter: Path, data: Path, tmp_path: Path, ivon_post: Cli, method: str
) -> None:
    out = tmp_path / "new" / "deep" / "out"
    ivon_post("fit", plain_adapter, "-d", data, "--method", method, "--validation", data, "-o", out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    Posterior.from_pretrained(out)
