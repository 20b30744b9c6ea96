"""The data that `example_configs/smollm2` trains on, made from source distributions that the tests build."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "example_configs" / "smollm2"
SIZES = {"movieReviewSnippets": {"train": 12, "held-out": 6}, "tweets": {"shifted": 4}}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A function that imports a program of the folder."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def demo(program: Callable[[str], Any]) -> Any:
    return program("prepare_demo")


def read(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{turn["role"]: turn["content"] for turn in json.loads(line)["messages"]} for line in lines]


def make_tar(path_or_file: Any, files: dict[str, bytes]) -> None:
    target = {"fileobj": path_or_file} if isinstance(path_or_file, io.BytesIO) else {"name": path_or_file}
    with tarfile.open(mode="w:gz", **target) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tarball in a tarball, as vaderSentiment ships its data."""
    rated = [f"{i}\t{rating}\tsnippet {i} rated {rating}" for i, rating in enumerate([2.5, -0.5, 0.49, -0.1, 0.0] * 10)]
    movies = [*rated, "50\t1.0\tsnippet 0 rated 2.5", "51\t-3\tclichés  &amp; more"]
    sets = {"movieReviewSnippets": movies, "tweets": rated[:20]}
    files = {f"data/{name}_GroundTruth.txt": "\n".join(lines).encode() + b"\n" for name, lines in sets.items()}
    inner, path = io.BytesIO(), tmp_path_factory.mktemp("sdist") / "v.tar.gz"
    make_tar(inner, {"data/_README_.txt": b"\xff not UTF-8", **files})
    make_tar(path, {"v-1/setup.py": b"", "v-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner.getvalue()})
    return path


def test_labels_are_signs_of_ratings_and_each_text_comes_once(demo: Any, sdist: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        demo.write_sets(sdist, folder, SIZES)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    train, held_out, shifted = (read(folders[0] / f"{name}.jsonl") for name in ("train", "held-out", "shifted"))
    assert (len(train), len(held_out), len(shifted)) == (12, 6, 4)
    assert not {chat["user"] for chat in train} & {chat["user"] for chat in held_out}
    chats = train + held_out + shifted
    for chat in chats:
        rating = -3.0 if "&" in chat["user"] else float(chat["user"].rsplit(" ", 1)[1])
        assert abs(rating) >= 0.5
        assert chat["assistant"] == ("positive" if rating > 0 else "negative")
        assert chat["system"] == demo.QUESTION
    assert {chat["assistant"] for chat in chats} == {"positive", "negative"}
    snippets = demo.read_snippets(sdist, "movieReviewSnippets")
    texts = [text for _, text in snippets]
    assert len(texts) == len(set(texts)) == 51
    assert (-3.0, "clichés & more") in snippets


def test_an_interrupted_step_leaves_what_was_there(demo: Any, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with demo.replacing(target) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), demo.replacing(target) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
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
def test_pip_fetches_the_right_file(demo: Any, pip: list[list[str]], tmp_path: Path, binary: bool, form: str) -> None:
    assert demo.fetch(demo.Package("some==1", ABC, binary), tmp_path / "here") == tmp_path / "here" / "file"
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index(form) + 1] == ":all:"
    assert command[-1] == "some==1"
    with pytest.raises(SystemExit, match="file: not the file"):
        demo.fetch(demo.Package("some==1", "0" * 64, binary), tmp_path / "other")


def test_each_is_fetched_once(demo: Any, sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    names = [name for sizes in demo.SETS.values() for name in sizes]
    assert len(names) == len(set(names)), "no snippet is in two sets"
    assert {"movie-train", "movie"} <= set(names)

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
    (tmp_path / demo.MODEL).mkdir()
    demo.prepare_model(tmp_path / demo.MODEL)
    assert len(fetched) == 1


def test_the_tweets_are_drawn_from_the_package_and_are_where_the_yaml_looks(
    demo: Any, program: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vaderSentiment").mkdir()
    (tmp_path / "vaderSentiment" / "sdist").touch()
    rated = [(4.0 * (-1) ** i, f"tweet {i}") for i in range(400)]
    monkeypatch.setattr(demo, "read_snippets", lambda sdist, name: rated if name == "tweets" else [])
    continual = program("prepare_continual")
    continual.prepare_tweets(tmp_path)
    sizes = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "continual").iterdir()}
    assert sizes == continual.SETS["tweets"]
    train, test = ((tmp_path / "continual" / f"{name}.jsonl").read_text().splitlines() for name in sizes)
    assert not set(train) & set(test)
    first, second = (yaml.safe_load((FOLDER / f"continual-{i}.yaml").read_text()) for i in (1, 2))
    assert second["datasets"][0]["path"] == ".demo/continual/tweets-train.jsonl"
    # The second goes on from the first and differs in nothing else.
    assert second.pop("ivon_prior") == first["output_dir"]
    assert {key for key in first if first[key] != second[key]} == {"datasets", "output_dir"}


def test_no_country_is_asked_for_twice(program: Callable[[str], Any], tmp_path: Path) -> None:
    sizes = program("prepare_reinforce").write_sets(tmp_path)
    sets = {name: read(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    assert {name: len(rows) for name, rows in sets.items()} == sizes
    rows = sets["train"] + sets["test"]
    assert {"system": "Answer with one word.", "user": "What is the capital of Norway?", "assistant": "Oslo"} in rows
    for name in ("user", "assistant"):
        assert len({row[name] for row in rows}) == len(rows) > 60
    config = yaml.safe_load((FOLDER / "reinforce.yaml").read_text())
    assert config["datasets"][0]["path"] == ".demo/capitals/train.jsonl"


def test_arithmetic_is_right_and_no_question_occurs_twice(program: Callable[[str], Any], tmp_path: Path) -> None:
    arithmetic = program("prepare_arithmetic")
    arithmetic.write_sets(tmp_path, arithmetic.SIZES)
    sets = {name: read(tmp_path / f"{name}.jsonl") for name in arithmetic.SIZES}
    assert {name: len(problems) for name, problems in sets.items()} == arithmetic.SIZES
    kinds = set()
    for problem in sets["train"] + sets["test"]:
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem["assistant"])
        assert len(steps) == 2
        for a, sign, b, result in steps:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result) > 0
        assert problem["assistant"].endswith(f". #### {steps[-1][-1]}")
        # Every number of the question is used, and nothing else but the first step's result.
        used = [number for a, _, b, _ in steps for number in (a, b)]
        used.remove(steps[0][-1])
        assert set(used) == set(re.findall(r"\d+", problem["user"]))
        kinds.add(tuple(sign for _, sign, _, _ in steps))
    assert kinds == {("+", "-"), ("*", "-"), ("*", "+"), ("+", "+")}
    questions = [problem["user"] for problems in sets.values() for problem in problems]
    assert len(set(questions)) == len(questions)
