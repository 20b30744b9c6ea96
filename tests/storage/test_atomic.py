"""What is written appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from axolotl_ivon import IVONError
from axolotl_ivon.storage.atomic import check_file, check_space, check_target, in_bytes, new_file, new_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def adapter_like(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_a_file_to_write_is_checked_before_the_work(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    check_file(path)
    path.write_text("precious")
    with pytest.raises(IVONError, match=r"output .* exists; choose another name, or overwrite it with overwrite"):
        check_file(path)
    check_file(path, overwrite=True)
    with pytest.raises(IVONError, match="is a folder"):
        check_file(tmp_path, overwrite=True)
    with pytest.raises(IVONError, match="there is no such folder"):
        check_file(tmp_path / "below" / "out.jsonl")


def test_a_folder_appears_whole(tmp_path: Path):
    target = tmp_path / "deep" / "target"
    with new_folder(target) as new:
        (new / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"
    assert names(target.parent) == {"target"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]):
    old = adapter_like(tmp_path / "target")
    for target in (old, tmp_path / "deep" / "new"):
        with pytest.raises(error), new_folder(target, overwrite=True) as new:
            (new / "adapter_config.json").write_text("new")
            raise error
    assert (old / "adapter_config.json").read_text() == "old"
    assert names(tmp_path) == {"target"}


@pytest.mark.parametrize("link", [False, True])
def test_overwriting_replaces_all_of_it_also_through_a_link(tmp_path: Path, link: bool):
    target = adapter_like(tmp_path / "target")
    (target / "stale").touch()
    (tmp_path / "link").symlink_to(target)
    with new_folder(tmp_path / "link" if link else target, overwrite=True) as new:
        (new / "adapter_config.json").write_text("new")
    assert names(target) == {"adapter_config.json"}
    assert (target / "adapter_config.json").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == {"link", "target"}


@pytest.mark.parametrize(
    ("target", "overwrite", "message"),
    [
        ("there", False, "there exists"),
        ("home", True, "something other"),
        ("home/thesis.tex", True, "not a folder"),
        ("run/input", True, "is the input, which is never modified"),
        ("link", True, "is the input, which is never modified"),
        ("run", True, "holds the input, which is never modified"),
        (".", False, "holds the input, which is never modified"),
        ("run/input/a/b", False, "lies in the input, which is never modified"),
    ],
)
def test_what_may_not_be_written_is_refused_and_left(target: str, overwrite: bool, message: str, tmp_path: Path):
    for name in ("there", "run", "run/input", "run/input-2"):
        adapter_like(tmp_path / name)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "input")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(IVONError, match=message), new_folder(tmp_path / target, overwrite, [tmp_path / "run/input"]):
        pass
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    check_target(tmp_path / "run" / "input-1", overwrite, [tmp_path / "run" / "input"])


@pytest.mark.parametrize("target", ["/proc/nothing/x", "/dev/null/x"])
def test_a_target_that_cannot_be_written(target: str):
    with pytest.raises(IVONError, match="cannot be written"), new_folder(Path(target)):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path):
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(IVONError, match="No space left"), new_file(target) as new:
        new.symlink_to("/dev/full")
        new.write_text("new")
    assert target.read_text() == "old"
    assert names(tmp_path) == {"x"}


def test_a_file_is_replaced_or_left(tmp_path: Path):
    target = tmp_path / "x"
    with new_file(target) as new:
        new.write_text("one")
    with pytest.raises(RuntimeError), new_file(target) as new:
        new.write_text("two")
        raise RuntimeError
    assert target.read_text() == "one"
    assert names(tmp_path) == {"x"}


def test_termination_leaves_nothing(tmp_path: Path):
    script = f"""
import time
from pathlib import Path
from axolotl_ivon.storage.atomic import new_folder
import ivon_post
def hang(**_):
    with new_folder(Path({str(tmp_path / "target")!r})) as new:
        (new / "a").write_text("a")
        print("writing", flush=True)
        time.sleep(60)
ivon_post.cli = hang
ivon_post.main()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert names(tmp_path) == set()


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "new" / "deep", free // 2, "this")
    with pytest.raises(IVONError, match=r"deep cannot be written \(9 draws take 1e\+03 TB, and .* of space are free\)"):
        check_space(tmp_path / "new" / "deep", 10**15, "9 draws")


def test_bytes_as_people_read_them():
    sizes = (0, 999, 1000, 1_900_000, 999_600, 186e9, 5e12, 4e15)
    assert [in_bytes(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1 kB", "1.9 MB", "1 MB", "186 GB", "5 TB", "4e+03 TB",
    ]  # fmt: skip
