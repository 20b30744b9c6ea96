"""The hidden file of an interrupted fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axolotl_ivon import IVONError
from axolotl_ivon.fitting import state as module
from axolotl_ivon.fitting.state import Snapshot, State

SNAPSHOT = Snapshot({"a": torch.arange(3.0), "b/c": torch.ones(2, 2).T}, {"step": 3, "nll": {"0.5": 0.25}})


def same(one: Snapshot | None, other: Snapshot) -> bool:
    assert one is not None
    return one.values == other.values and all(value.equal(one.tensors[key]) for key, value in other.tensors.items())


def test_what_was_written_is_read_by_the_same_fit_alone(tmp_path: Path) -> None:
    path = tmp_path / ".out.fit"
    State(path, "mine").write(SNAPSHOT)
    assert same(State(path, "mine").read(), SNAPSHOT)
    assert State(path, "other").read() is None
    State(path, "other").write(Snapshot({}, {}))
    assert State(path, "mine").read() is None
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert State(tmp_path / "x", "mine").read() is None


def test_it_is_written_now_and_then_and_on_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    kept = State(path, "mine")
    kept.keep(lambda: pytest.fail("too early"))
    monkeypatch.setattr(module, "_EVERY", 0.0)
    kept.keep(lambda: SNAPSHOT)
    assert same(kept.read(), SNAPSHOT)
    path.unlink()
    with pytest.raises(KeyboardInterrupt), kept.kept(lambda: SNAPSHOT):
        raise KeyboardInterrupt
    assert same(kept.read(), SNAPSHOT)
    with kept.kept(lambda: pytest.fail("nothing happened")):
        pass


def test_without_a_path_nothing_is_kept() -> None:
    kept = State(None, "mine")
    kept.write(SNAPSHOT)
    kept.keep(lambda: pytest.fail("there is no file"))
    assert kept.read() is None


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(IVONError, match="cannot be written"):
        State(tmp_path / "no" / "x", "mine").write(SNAPSHOT)
    with pytest.raises(KeyError), State(tmp_path / "no" / "x", "mine").kept(lambda: SNAPSHOT):
        raise KeyError
