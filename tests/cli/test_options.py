"""A message names the option or argument of the command that ran, whatever the library calls it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command_line import Cli

import axolotl_ivon
from axolotl_ivon.errors import IVONError, param_ref
from axolotl_ivon.fitting import problem
from axolotl_ivon.generation.utilities import UTILITIES
from axolotl_ivon.models.session import Loading
from axolotl_ivon.posterior import combine, prune
from axolotl_ivon.records import influence
from ivon_post import _option, cli
from ivon_post._options import Sectioned, chat_template_option, model_options

CONTEXT = click.Context(cli)
COMMANDS = [command for name in cli.list_commands(CONTEXT) if (command := cli.get_command(CONTEXT, name))]
# Packages whose parameters are options of some command, but for those that only the library takes.
PACKAGES = ("data", "evaluation", "generation", "models")
GREEK, PARENTHESES = re.compile("[α-ωΑ-Ω]"), re.compile(r"\([^()]*\)")
LIBRARY = {"draws_per_pass"}


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


@pytest.mark.parametrize(
    ("command", "name", "shown"),
    [
        ("generate", "per_model", "--per-model"),
        ("generate", "n", "-n"),
        ("generate", "adapter", "ADAPTER"),
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
    error = IVONError(f"{param_ref(name)} x: wrong")
    told = error.describe(lambda parameter: _option(cli.get_command(CONTEXT, command), parameter))
    assert told == f"{shown} x: wrong"


OPTIONS = [(command, param) for command in COMMANDS for param in command.params if isinstance(param, click.Option)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_a_short_help_is_a_whole_phrase(command: click.Command) -> None:
    phrase = command.get_short_help_str(limit=51)
    assert len(phrase) <= 51  # with the full stop, which the group leaves out
    assert not phrase.endswith("...")
    assert not GREEK.search(PARENTHESES.sub("", phrase))
    assert {"as_json", "quiet"} <= {param.name for param in command.params}


@pytest.mark.parametrize(
    ("command", "option"), OPTIONS, ids=[f"{command.name} {option.opts[0]}" for command, option in OPTIONS]
)
def test_a_help_is_a_phrase_that_begins_without_a_symbol(command: click.Command, option: click.Option) -> None:
    """Greek letters stand in parentheses, or after the first phrase."""
    if option.hidden:
        return
    text = " ".join((option.help or "").split())
    first = re.split(r"[.:;] ", PARENTHESES.sub("", text))[0]
    assert first[:1].isupper()
    assert len(text) <= 240
    assert text.endswith((".", "]"))
    assert not GREEK.search(first + (option.metavar or ""))


def test_options_stand_in_sections(ivon_post: Cli) -> None:
    lines = ivon_post("eval", "--help").splitlines()
    heads = [line.rstrip(":") for line in lines if line and not line[0].isspace() and line.endswith(":")]
    assert heads == ["Options", "Posterior", "Data", "Model", "Output"]
    place = {name: next(i for i, line in enumerate(lines) if name in line) for name in ("--tau", "--device", "--json")}
    assert lines.index("Posterior:") < place["--tau"] < lines.index("Data:")
    assert lines.index("Model:") < place["--device"] < lines.index("Output:") < place["--json"]


def loaded(*words: str) -> Loading:
    """Return what the options of a command about its model become."""
    command = click.command(cls=Sectioned)(model_options(chat_template_option(lambda loading: loading)))
    return command(words, standalone_mode=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, "auto")),
        (["--load-in", "4bit"], ("4bit", "auto")),
        (["--load-in", "bfloat16"], (None, "bfloat16")),
        (["--load-in", "8bit", "--dtype", "float16"], ("8bit", "float16")),
    ],
)
def test_one_option_for_the_precision_of_the_base_model(words: list[str], expected: tuple[str | None, str]) -> None:
    loading = loaded(*words)
    assert (loading.load_in, loading.dtype) == expected


def test_arguments_of_the_chat_template_are_json() -> None:
    for text, expected in (('{"enable_thinking": false}', {"enable_thinking": False}), ("{}", {})):
        assert loaded("--chat-template-kwargs", text).chat_template_kwargs == expected
    for text in ("enable_thinking=false", "[1]", "[" * 99999):
        with pytest.raises(click.BadParameter, match="is not a JSON object; say"):
            loaded("--chat-template-kwargs", text)


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
    assert not [name for _, option in OPTIONS for name in option.opts if "prune" in name]
    assert len(OPTIONS) <= 223


def test_the_next_command_is_told_to_people_alone(ivon_post: Cli, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    result = ivon_post.run("temper", tiny_adapter, "--tau", 2, "-o", folder)
    assert result.stdout.splitlines()[-1] == str(folder)
    assert result.stderr == f"next: ivon-post eval '{folder}' --data FILE.jsonl\n"
    for option in ("--json", "--quiet"):
        assert ivon_post.run("temper", tiny_adapter, "--tau", 2, "-o", f"{folder}{option}", option).stderr == ""


# The library's own lists, which the command line repeats so that it starts without what they are defined among.
CHOICES = [
    ("fit", "method", problem.METHODS),
    ("combine", "method", combine.METHODS),
    ("mbr", "utility", tuple(UTILITIES)),
    ("serve", "combine", (*UTILITIES, "rescore")),
    ("influence", "by", influence.SCORES),
    ("prune", "scope", prune.SCOPES),
]


@pytest.mark.parametrize(("name", "parameter", "known"), CHOICES)
def test_choices_are_those_of_the_library(name: str, parameter: str, known: tuple[str, ...]) -> None:
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    [kind] = [each.type for each in command.params if each.name == parameter]
    assert isinstance(kind, click.Choice)
    assert tuple(kind.choices) == tuple(known)
