"""A message names the option or argument of the command that ran, whatever the library calls it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command_line import Cli
from tiny import write_chats

import axolotl_ivon
from axolotl_ivon.errors import IVONError, param_ref
from ivon_post import _option, cli
from ivon_post._options import BatchSize, Numbers

CONTEXT = click.Context(cli)
COMMANDS = [command for name in cli.list_commands(CONTEXT) if (command := cli.get_command(CONTEXT, name))]
# Packages whose parameters are options of some command, but for those that only the library takes.
PACKAGES = ("data", "evaluation", "generation", "models")
LIBRARY = {"draws_per_pass", "max_shard_size"}


def named() -> Iterator[str]:
    """Every name that is written out in a call of `param_ref`."""
    for package in PACKAGES:
        for path in (Path(axolotl_ivon.__file__).parent / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "param_ref":
                    yield from (a.value for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize("name", sorted(set(named()) - LIBRARY))
def test_every_parameter_is_an_option_of_some_command(name: str) -> None:
    assert any(_option(command, name) != name for command in COMMANDS)


def told(command: str, message: str) -> str:
    return IVONError(message).describe(lambda name: _option(cli.get_command(CONTEXT, command), name))


@pytest.mark.parametrize(
    ("command", "name", "shown"),
    [
        ("generate", "per_model", "--per-model"),
        ("generate", "n", "-n"),
        ("generate", "adapter", "ADAPTER"),
        ("eval", "ratio", "--ratio"),
        ("prune", "ratio", "--ratio"),
        ("sweep", "ratio", "--ratio"),
        ("sweep", "tau", "--tau"),
        ("sweep", "taus", "--tau"),
        ("mbr", "file", "FILE"),
        ("mbr", "output", "--output"),
        ("combine", "adapters", "ADAPTER"),
        ("diff", "second", "B"),
        ("prune", "base_model", "base_model"),
        ("prune", "nothing_like_it", "nothing_like_it"),
    ],
)
def test_how_a_parameter_is_shown(command: str, name: str, shown: str) -> None:
    assert told(command, f"{param_ref(name)} x: wrong") == f"{shown} x: wrong"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=4)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("eval ADAPTER -d no.jsonl", "--data no.jsonl: cannot be read (there is no such file)"),
        ("eval ADAPTER -d empty.jsonl", "--data empty.jsonl: the file is empty"),
        ("eval ADAPTER -d CHATS --choices A,A", "--choices A,A: give at least two different"),
        ("eval ADAPTER -d CHATS --choices A,C", "is not one of --choices A,C"),
        ("eval ADAPTER -d CHATS --choices A,B,Bx", "reword them, or use --task generate"),
        ("eval ADAPTER -d one.jsonl --task choice", "name the others with --choices A,B"),
        ("eval ADAPTER -d CHATS --task classify", "--task classify: the adapter"),
        ("eval ADAPTER -d CHATS --device abacus", "--device abacus: not usable here"),
        ("eval ADAPTER -d CHATS --base-model ./no", "name another with --base-model"),
        ("eval ADAPTER -d CHATS --rows mode", "--rows mode: 'mode' is unknown"),
        ("sweep ADAPTER -d CHATS --tau 1 --ratio 0", "--tau and --ratio: one point"),
        ("generate ADAPTER -p no.jsonl", "--prompts no.jsonl: cannot be read (there is no such file)"),
        ("generate ADAPTER -p CHATS --per-model 5", "is not a multiple of --per-model 5"),
        ("generate ADAPTER -p CHATS --top-p 0", "--top-p 0.0: must be above 0"),
        ("generate ADAPTER -p CHATS --max-tokens 0", "--max-tokens 0: must be at least 1"),
        ("merge ADAPTER --base-model ./no", "name another with --base-model"),
        ("mbr no.jsonl", "FILE no.jsonl: cannot be read (there is no such file)"),
        ("mbr CHATS -a [", "--answer-regex '[': not a regular expression"),
    ],
)
def test_bad_input_names_the_option(
    words: str,
    shown: str,
    ivon_post: Cli,
    tiny_adapter: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    turns = '[{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]'
    Path("one.jsonl").write_text(f'{{"messages": {turns}}}\n')
    places = {"ADAPTER": tiny_adapter, "CHATS": chats}
    output = [] if words.startswith("eval") else ["-o", tmp_path / "out"]
    line = ivon_post.error(*(places.get(word, word) for word in words.split()), *output, "--quiet")
    assert shown in line
    assert not set(line) & {"\ue000", "\ue001"}


def test_numbers_and_batch_sizes() -> None:
    assert Numbers().convert("0.5,1,inf", None, None) == (0.5, 1.0, float("inf"))
    assert [BatchSize().convert(value, None, None) for value in ("auto", "8")] == [None, 8]
    for kind, bad in ((Numbers(), "hot"), (Numbers(), "1,,2"), (BatchSize(), "0"), (BatchSize(), "-1")):
        with pytest.raises(click.BadParameter, match=f"'{bad}' is"):
            kind.convert(bad, None, None)


def test_a_former_name_works_and_is_not_shown(ivon_post: Cli, tiny_adapter: Path, tmp_path: Path) -> None:
    for name in ("sample", "merge", "eval", "generate"):
        text = ivon_post(name, "--help")
        assert "--ratio" in text
        assert "--prune-ratio" not in text
    drawn = {}
    for option in ("--ratio", "--prune-ratio"):
        ivon_post("sample", tiny_adapter, "-n", 1, option, 0.4, "-o", tmp_path / option)
        drawn[option] = (tmp_path / option / "sample-0000" / "adapter_model.safetensors").read_bytes()
    assert drawn["--ratio"] == drawn["--prune-ratio"]
    assert "'--ratio': 'x' is not a valid float" in ivon_post.run("sample", "a", "--prune-ratio", "x").stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_one_name_for_the_ratio(command: click.Command) -> None:
    assert not [option for param in command.params for option in param.opts if "prune-ratio" in option]


def test_the_next_command_is_told_to_people_alone(ivon_post: Cli, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    result = ivon_post.run("temper", tiny_adapter, "--tau", 2, "-o", folder)
    assert result.stdout.splitlines()[-1] == str(folder)
    assert result.stderr == f"next: ivon-post eval '{folder}' --data FILE.jsonl\n"
    for option in ("--json", "--quiet"):
        assert ivon_post.run("temper", tiny_adapter, "--tau", 2, "-o", f"{folder}{option}", option).stderr == ""


@pytest.mark.parametrize("name", ["", "-"])
def test_an_output_without_a_name_is_refused(name: str, ivon_post: Cli, tiny_adapter: Path) -> None:
    assert "is not a file name" in ivon_post.error("prune", tiny_adapter, "-o", name)
