"""Writing where it goes wrong: a full disk, a folder that is read-only, two writers, a process killed at any rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import WRITING, fill, snapshot

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.storage import atomic
from axolotl_ivon.storage.atomic import new_folder, updated_adapter

MEAN, SIGMA = "adapter_model.safetensors", "ivon_sigma.safetensors"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a small file system; only root may."""
    place = tmp_path / "mount"

    def make(options: str) -> Path:
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a tmpfs takes a right that this process has not")
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield make
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("disk", ["full", "full, overwriting", "read-only", "read-only, overwriting"])
@pytest.mark.parametrize("command", WRITING)
def test_a_disk_that_cannot_be_written_stays_as_it_was(
    command: str, disk: str, mount: Callable[..., Path], tiny_adapter: Path, other_adapter: Path, ivon_post: Any
) -> None:
    place = mount("size=32k" if disk.startswith("full") else "size=1m")
    if disk == "full":
        (place / "other").write_bytes(bytes(20 * 1024))
    if disk.endswith("overwriting"):
        (place / "out").mkdir()
        for name in ("adapter_config.json", MEAN, SIGMA):
            shutil.copy(tiny_adapter / name, place / "out" / name)
    if disk.startswith("read-only"):
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    before = snapshot(place)
    line = ivon_post.error(*fill(WRITING[command], tiny_adapter, other_adapter, place / "out"), "--overwrite")
    assert "out cannot be written (" in line
    assert ("Read-only file system" if disk.startswith("read-only") else "space") in line.replace("Space", "space")
    assert snapshot(place) == before


@pytest.mark.parametrize("command", WRITING)
def test_what_is_there_is_overwritten_only_if_asked_and_never_an_input(
    command: str, tiny_adapter: Path, other_adapter: Path, copied: Callable[..., Path], ivon_post: Any, tmp_path: Path
) -> None:
    adapter, there = copied(tiny_adapter), copied(tiny_adapter, "there")
    before = snapshot(tmp_path)
    assert "with --overwrite" in ivon_post.error(*fill(WRITING[command], adapter, other_adapter, there))
    message = ivon_post.error(*fill(WRITING[command], adapter, other_adapter, adapter), "--overwrite")
    assert "is the input, which is never modified" in message
    assert snapshot(tmp_path) == before
    ivon_post(*fill(WRITING[command], adapter, other_adapter, there), "--overwrite")
    changed = snapshot(tmp_path).items() ^ before.items()
    assert {name.split("/")[0] for name, _ in changed} == {"there"}


def test_saving_from_training_on_a_full_disk_leaves_the_old_pair(
    mount: Callable[..., Path], tiny_adapter: Path, make_adapter: Callable[..., Path]
) -> None:
    disk = mount("size=64k")
    shutil.copytree(tiny_adapter, disk / "out", ignore=shutil.ignore_patterns("token*", "*.jinja"))
    before = snapshot(disk)
    with pytest.raises(IVONError, match="No space left"), updated_adapter(disk / "out") as new:
        for name in (MEAN, SIGMA):
            shutil.copy(make_adapter(r=8) / name, new / name)
        (new / "more").write_bytes(bytes(65536))
    assert snapshot(disk) == before


class Killed(BaseException):
    """The process is gone: not even `finally` runs."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], bool]:
    """A function that runs something, kills it before the n-th change of the disk's names, and says whether it did."""

    def run(n: int, work: Callable[[], None]) -> bool:
        left = n

        def counted(function: Any) -> Any:
            def change(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:  # and everything that `finally` would do is not done either
                    raise Killed
                return function(*args, **kwargs)

            return change

        with monkeypatch.context() as patch:
            changes = [(os, name) for name in ("rename", "replace", "unlink", "rmdir", "mkdir")]
            for owner, name in [*changes, (atomic, "_exchange"), (shutil, "rmtree")]:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            with contextlib.suppress(Killed):
                work()
        return left < 0

    return run


@pytest.mark.parametrize("old", ["none", "same shapes", "other shapes"])
def test_whoever_reads_after_a_kill_finds_a_mean_with_its_own_sigma(
    old: str, killed_at: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    new, before = make_adapter(seed=3), make_adapter(r=4 if old == "same shapes" else 2)
    found = []
    for n in range(100):
        folder = tmp_path / str(n)
        if old != "none":
            shutil.copytree(before, folder)

        def save(folder: Path = folder) -> None:
            with updated_adapter(folder) as temporary:
                for name in ("adapter_config.json", MEAN, SIGMA):
                    shutil.copy(new / name, temporary / name)

        killed = killed_at(n, save)
        if (folder / MEAN).exists():
            q = Posterior.from_pretrained(folder)
            found.append((folder / MEAN).read_bytes() == (new / MEAN).read_bytes())
            original = Posterior.from_pretrained(new if found[-1] else before)
            assert all((q.sigma[key] == original.sigma[key]).all() for key in q.sigma)
        else:
            assert old == "none"
        if not killed:
            break
        save()  # the next save ends as if nothing had been
        assert Posterior.from_pretrained(folder).metadata == Posterior.from_pretrained(new).metadata
        assert not (folder / ".ivon_sigma.safetensors.next").exists()
    assert not killed
    assert found[-1]
    assert found == sorted(found)
    assert len(found) > 5 or old == "none"
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("exchange", [True, False], ids=["at-once", "in-two-renames"])
def test_overwriting_is_killed(exchange: bool, killed_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    seen = []
    for n in range(100):
        target = tmp_path / str(n) / "target"
        target.mkdir(parents=True)
        (target / "adapter_config.json").write_text("old")

        def save(target: Path = target) -> None:
            with new_folder(target, overwrite=True) as new:
                (new / "adapter_config.json").write_text("new")

        killed = killed_at(n, save)
        if exchange or target.exists():
            seen.append((target / "adapter_config.json").read_text())
        else:  # the moment between the two: nothing is lost
            hidden = list(target.parent.glob(".*/adapter_config.json"))
            assert {path.read_text() for path in hidden} == {"old", "new"}
        if not killed:
            break
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


WRITER = """
import sys, time
from pathlib import Path
import axolotl_ivon.storage.atomic as files
import ivon_post
put_in_place = files.put_in_place
def slowly(*args, **kwargs):
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    put_in_place(*args, **kwargs)
files.put_in_place = slowly
ivon_post.main()
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_with_one_target(overwrite: bool, tiny_adapter: Path, tmp_path: Path) -> None:
    """Both have written all before either takes the name: one has it whole, the other is told, or comes second."""
    if overwrite:
        shutil.copytree(tiny_adapter, tmp_path / "out")
    words = ["-o", str(tmp_path / "out"), *(["--overwrite"] if overwrite else [])]
    command = [sys.executable, "-c", WRITER, "temper", str(tiny_adapter), *words, "--tau"]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    writers = [subprocess.Popen([*command, tau], text=True, **pipes) for tau in ("2", "3")]
    for writer in writers:
        assert writer.stderr is not None
        assert writer.stderr.readline() == "ready\n"
    results = [(writer.communicate("go\n", timeout=60), writer.returncode) for writer in writers]
    assert results[0][1] == 0
    tau = Posterior.from_pretrained(tmp_path / "out").metadata["tau"]
    assert (results[1][1], tau) == ((0, "3.0") if overwrite else (1, "2.0"))
    if not overwrite:
        assert results[1][0][1] == f"Error: {tmp_path / 'out'} cannot be written (Directory not empty)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
