"""Errors for users: one line, whose parameters each caller names its own way; the library does not speak the CLI."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

import axolotl_ivon
from axolotl_ivon.errors import IVONError, one_line, param_ref, printable

ROOT = Path(axolotl_ivon.__file__).parent
# What is no option of `ivon-post`: another program's, or a variable of a style sheet.
OTHERS = {
    "--o",  # a line of matplotlib's
    *("--blue", "--vermilion", "--green", "--grey", "--natural"),
    *("--enable-lora", "--max-lora-rank", "--max-loras", "--generation-config", "--lora-modules"),
}


def named_options(path: Path) -> Iterator[tuple[int, str]]:
    """Line and option for each `--word` in a string that is no docstring and quotes no whole command of ivon-post."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = re.sub(r"(`|^)ivon-post [^`]*(`|$)", "", node.value)
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
                yield node.lineno, option


def test_the_library_names_no_option() -> None:
    paths = sorted(ROOT.rglob("*.py"))
    assert len(paths) > 50
    found = [
        f"{path.relative_to(ROOT)}:{line}: {option}"
        for path in paths
        for line, option in named_options(path)
        if option not in OTHERS
    ]
    assert not found, "name the parameter: {param_ref('…')} of axolotl_ivon.errors"


NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_characters="\ue000\ue001"), max_size=30)


@given(st.lists(st.tuples(TEXTS, NAMES), max_size=5), TEXTS)
def test_parameters_are_named_as_the_caller_likes(pairs: list[tuple[str, str]], end: str) -> None:
    error = IVONError("".join(text + param_ref(name) for text, name in pairs) + end)
    for show in (str, lambda name: f"--{name.replace('_', '-')}"):
        assert error.describe(show) == "".join(printable(text) + show(name) for text, name in pairs) + printable(end)
    assert str(error) == error.describe(str)
    assert error.parameter == (pairs[0][1] if pairs else None)


@given(st.text(max_size=200), st.integers(0, 3000))
@example("a\nb\x1b[31m\x00\u202e\ue000\ue001", 0)
def test_a_message_is_one_line_that_a_terminal_does_not_obey(text: str, more: int) -> None:
    line = str(IVONError(text + "x" * more))
    assert line.isprintable()
    assert len(line) < 2100


def test_a_long_line_keeps_both_ends_and_several_are_one() -> None:
    line = str(IVONError("begin" + "x" * 100_000 + "end"))
    assert len(line) < 2100
    assert line.startswith("begin")
    assert line.endswith("end")
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
