"""The error that a user is meant to read: one line, with a parameter that each host names in its own way."""

from __future__ import annotations

import pytest

from axolotl_ivon.errors import IVONError, one_line, parameter, printable


def test_python_shows_the_parameter_and_a_host_its_own_name() -> None:
    error = IVONError(f"{parameter('per_model')}: 3 is refused; give {parameter('n')}")
    assert str(error) == "per_model: 3 is refused; give n"
    assert error.told(lambda name: "--" + name.replace("_", "-")) == "--per-model: 3 is refused; give --n"
    assert error.parameter == "per_model"
    assert IVONError("no file").parameter is None


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31mred", "\x00", "right\u202eleft", "\ue000", "\ue001"])
def test_what_a_terminal_would_obey_comes_escaped(text: str) -> None:
    assert printable(text).isprintable()
    assert str(IVONError(text)).isprintable()
    assert str(IVONError(f"{parameter('ratio')}: {text}")).startswith("ratio: ")


def test_what_is_printable_stays_as_it_is() -> None:
    assert str(IVONError("σ, λ and × are refused")) == "σ, λ and × are refused"


def test_a_long_line_keeps_both_ends() -> None:
    line = str(IVONError("begin" + "x" * 100_000 + "end"))
    assert len(line) < 2100
    assert line.startswith("begin")
    assert line.endswith("end")


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\n\nc")) == "a b c"
