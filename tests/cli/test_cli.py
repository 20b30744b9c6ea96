"""`ivon-post` itself: start-up, help, tables, and what every command does the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import process

from ivon_post._tables import decimal, emit, number, percent, print_table


def test_help_imports_nothing_heavy():
    program = (
        "import sys, ivon_post\n"
        "try: ivon_post.cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'rich', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = process(program=program, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        *[(f"{shell}_source", "", "ivon_post") for shell in ("bash", "zsh", "fish")],
        ("bash_complete", "ivon-post prune --criterion m", "plain,magnitude\n"),
    ],
)
def test_completion(kind: str, words: str, expected: str):
    environment = {"_IVON_POST_COMPLETE": kind, "COMP_WORDS": words, "COMP_CWORD": "3", "PATH": "/usr/bin:/bin"}
    printed = process(env=environment).stdout
    assert expected in printed
    assert printed.count("plain,") <= 1


def test_a_process_writes_beside_the_input_or_fails_with_one_line(tiny_adapter: Path, copied: Callable, tmp_path: Path):
    done = process("prune", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path / 'missing'}: no such folder\n"
    folder = copied(tiny_adapter)
    done = process("prune", folder.name, "--ratio", "0.25", cwd=folder.parent, check=True)
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


def test_numbers_tables_and_documents_as_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [number(None), number(0.0123456)] == ["–", "0.0123"]
    assert [percent(None), percent(0.8512), percent(0.5, 0.01), percent(0.0)] == ["–", "85.1", "50.0 ± 1.0", "0.0"]
    assert [decimal(None), decimal(0.5), decimal(0.5, 0.25)] == ["–", "0.500", "0.500 ± 0.250"]
    print_table(["module", "n"], [["x" * 200, "1"], ["[/bold]", "22"]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["module", "n"], ["x" * 200, "1"], ["[/bold]", "22"]]
    emit({"a": [1.5, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        emit({"a": float("inf")})
