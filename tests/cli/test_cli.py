"""`ivon-post` itself: start-up, help, and what every command does the same way."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import torch

from ivon_post import cli


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `ivon-post` as a process of its own."""
    script = [sys.executable, "-c", "import ivon_post; ivon_post.main()"]
    return subprocess.run([*script, *map(str, arguments)], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_help_imports_nothing_heavy():
    script = (
        "import sys, ivon_post\n"
        "try: ivon_post.cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'rich', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_every_command_has_help(name: str, ivon_post: Callable):
    text = ivon_post(name, "--help")
    assert "Usage:" in text
    assert "--json" in text
    assert "--quiet" in text


def test_help_of_temper_says_how_the_papers_differ(ivon_post: Callable):
    text = " ".join(ivon_post("temper", "--help").split())
    assert "2506.14280" in text
    assert "2411.04421" in text
    assert "its τ is 1/τ here" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_there(shell: str):
    done = run(env={"_IVON_POST_COMPLETE": f"{shell}_source", "PATH": "/usr/bin:/bin"})
    assert "ivon-post" in done.stdout or "ivon_post" in done.stdout


def test_completion_of_criteria():
    words = {"COMP_WORDS": "ivon-post prune --criterion m", "COMP_CWORD": "3"}
    done = run(env={"_IVON_POST_COMPLETE": "bash_complete", "PATH": "/usr/bin:/bin", **words})
    assert done.stdout.split() == ["plain,magnitude"]


def test_a_process_fails_with_one_line_and_status_1(tmp_path: Path):
    done = run("prune", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path / 'missing'}: no such folder\n"


def test_a_process_writes_beside_the_input(tiny_adapter: Path, copied: Callable):
    folder = copied(tiny_adapter)
    done = run("prune", folder.name, "--ratio", "0.25", cwd=folder.parent, check=True)
    assert done.stdout.splitlines() == ["224 of 896 weights are 0 (25.00%), by snr", "adapter-pruned-0.25"]
    assert done.stderr == "next: ivon-post eval adapter-pruned-0.25 --data FILE.jsonl\n"
    assert (folder.parent / "adapter-pruned-0.25" / "ivon_sigma.safetensors").is_file()


@pytest.mark.parametrize("source", ["adapter", "adapter/", "./adapter", "."])
def test_default_targets(
    source: str, tiny_adapter: Path, copied: Callable, monkeypatch: pytest.MonkeyPatch, ivon_post: Callable
):
    folder = copied(tiny_adapter)
    monkeypatch.chdir(folder if source == "." else folder.parent)
    written = Path(ivon_post("temper", source, "--tau", "2").splitlines()[-1])
    assert written.resolve() == (folder.parent / "adapter-tau-2").resolve()
    assert written.is_dir()


def test_a_hub_id_writes_here(tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ivon_post: Callable):
    snapshot = tmp_path / "hub" / "models--someone--mine" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    snapshot.symlink_to(tiny_adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert ivon_post("sample", "someone/mine", "-n", 1).splitlines()[-1] == "mine-samples-1"
    assert (tmp_path / "mine-samples-1" / "sample-0000").is_dir()


def test_axolotl_runs_it(tiny_adapter: Path, tmp_path: Path):
    [entry] = [entry for entry in entry_points(group="axolotl.cli_commands") if entry.name == "ivon-post"]
    assert entry.load() is cli
    script = [sys.executable, "-c", "from axolotl.cli.main import cli; cli()", "ivon-post"]
    words = [*script, "prune", str(tiny_adapter), "-o", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert re.search(r"^90 of 896 weights are 0", done.stdout, re.MULTILINE)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_axolotl_merges_what_was_written(
    tiny_adapter: Path, tiny_llama: Path, tmp_path: Path, make_config: Callable, ivon_post: Callable
):
    from peft import PeftModel
    from runs import axolotl
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ivon_post("sample", tiny_adapter, "-n", 1, "--ratio", 0.3, "-o", tmp_path / "ensemble")
    member, config = tmp_path / "ensemble" / "sample-0000", make_config("merge")
    done = axolotl("merge-lora", config, "--lora-model-dir", member, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), member).merge_and_unload()
    merged = load_file(config.parent / "merge" / "merged" / "model.safetensors")
    assert set(merged) == set(expected.state_dict())
    for key, value in merged.items():
        torch.testing.assert_close(value.float(), expected.state_dict()[key].to(value.dtype).float())
