"""The files of this format version must be read by every later version of the library: format-1 holds some."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.storage.format import file_names, find_base_model, moved_config, read_json, resolve

# Never write these again: add another folder when the format changes.
VERSION_1 = Path(__file__).parent / "format-1"


def test_an_adapter_of_format_version_1() -> None:
    """Trained by version 0.1.0 on the tiny Llama, then read without this library: its values are written down here."""
    q = Posterior.from_pretrained(VERSION_1 / "adapter")
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    assert q.metadata == expected["metadata"]
    assert q.config["r"] == expected["r"]
    assert {key: list(value.shape) for key, value in q.mean.items()} == expected["shapes"]
    for kind, tensors in (("mean", q.mean), ("sigma", q.sigma)):
        sums = {key: float(value.double().sum()) for key, value in tensors.items()}
        assert sums == pytest.approx(expected[kind], rel=1e-12)


def test_a_draw_and_a_pruned_adapter_are_what_they_were(ivon_post: Any, tmp_path: Path) -> None:
    """The seed of an ensemble is all that some people keep of it."""
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    draw = Posterior.from_pretrained(VERSION_1 / "adapter").prune(0.3).temper(2).sample(seed=5, member=3)
    assert {key: float(value.double().sum()) for key, value in draw.items()} == pytest.approx(expected["draw"], 1e-12)
    assert ivon_post.json("prune", VERSION_1 / "adapter", "-o", tmp_path / "out")["pruned"] == expected["pruned"]


def test_what_a_later_version_adds_is_kept(copied: Callable[..., Path], ivon_post: Any) -> None:
    """In the header of σ and of the mean, and in adapter_config.json, by every command that writes an adapter."""
    folder = copied(VERSION_1 / "adapter")
    for name in ("adapter_model.safetensors", "ivon_sigma.safetensors"):
        with safe_open(folder / name, "np") as file:
            header = file.metadata()
        save_file(load_file(folder / name), folder / name, {**header, "new_fact": "kept"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "new_field": {"a": [1, None]}}))
    here = folder.parent
    ivon_post("prune", folder, "-o", here / "pruned")
    ivon_post("temper", here / "pruned", "--tau", 2, "-o", here / "tempered")
    q = Posterior.from_pretrained(folder).temper(2)
    Posterior({key: 1.1 * x for key, x in q.mean.items()}, q.sigma, q.metadata, q.config).save_pretrained(
        here / "other"
    )
    ivon_post("combine", here / "tempered", here / "other", "--method", "linear", "-o", here / "combined")
    for name in ("pruned", "tempered", "combined"):
        q = Posterior.from_pretrained(here / name)
        assert q.metadata["new_fact"] == "kept"
        assert q.config["new_field"] == {"a": [1, None]}
    with safe_open(here / "tempered" / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["new_fact"] == "kept"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('"\\ud800', "not valid JSON"),
        (None, "larger than"),
    ],
)
def test_json_that_is_none_or_of_absurd_size(tmp_path: Path, text: str | None, message: str):
    with (tmp_path / "x.json").open("w") as file:
        file.write(text) if text else file.truncate(2**40)
    with pytest.raises(IVONError, match=message):
        read_json(tmp_path / "x.json")


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local copy of someone/thing, of the Hub."""
    folder = model(tmp_path / "models--someone--thing" / "snapshots" / "abc")
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return folder


def test_a_hub_id_resolves_to_its_local_copy(snapshot: Path):
    (snapshot / "adapter_config.json").touch()
    assert resolve("someone/thing").samefile(snapshot)
    with pytest.raises(IVONError, match="nobody/nothing: no such folder here, and not found on the Hub"):
        resolve("nobody/nothing")


def test_only_what_looks_like_a_hub_id_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    for source in (tmp_path / "missing", "./some/thing", "adapter", "a/b/c", "../x"):
        with pytest.raises(IVONError, match="no such folder"):
            resolve(source)
    (tmp_path / "file").touch()
    with pytest.raises(IVONError, match="is a file"):
        resolve(tmp_path / "file")


@pytest.mark.parametrize("name", ["./base", "base", "../base", "models/base"])
def test_a_relative_base_model_is_found_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training ran in `work`, or in a folder of it, and the adapter is in `work/runs/out`."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    (work / "runs" / "out").mkdir(parents=True)
    elsewhere.mkdir()
    base = model(work / "models" / "base" if name == "models/base" else work / "base")
    for here in (work, elsewhere):
        monkeypatch.chdir(here)
        found = find_base_model({"base_model_name_or_path": name}, work / "runs" / "out")
        assert Path(found).is_absolute()
        assert Path(found).samefile(base)
    assert find_base_model({}, work / "runs" / "out", str(base)) == str(base)
    monkeypatch.chdir(work)
    given = os.path.relpath(base)
    assert find_base_model({}, Path("runs/out"), given) == str(base), "what a user names is relative to where they are"
    monkeypatch.chdir(elsewhere)
    with pytest.raises(IVONError, match=rf"no folder {given} with a config.json here, .*name another with base_model"):
        find_base_model({}, work / "runs" / "out", given)


def test_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = model(tmp_path / "here" / "base"), model(tmp_path / "there" / "base")
    monkeypatch.chdir(here.parent)
    config = {"base_model_name_or_path": "base"}
    assert find_base_model(config, there.parent) == str(here)
    monkeypatch.chdir(tmp_path)
    assert find_base_model(config, there.parent) == str(there)


def test_a_base_model_of_the_hub_keeps_its_name(snapshot: Path, tmp_path: Path) -> None:
    assert find_base_model({"base_model_name_or_path": "someone/thing"}, tmp_path) == "someone/thing"
    for name, message in (
        ("nobody/base", r"the base model nobody/base cannot be loaded \(.*not found on the Hub"),
        ("/no/base", r"the base model /no/base cannot be loaded \(no folder /no/base with a config.json"),
        (None, r"adapter_config\.json names no base model"),
        (["x"], r"adapter_config\.json names no base model"),
    ):
        with pytest.raises(IVONError, match=message) as error:
            find_base_model({"base_model_name_or_path": name}, tmp_path)
        assert error.value.parameter == "base_model"


def test_a_base_model_that_would_not_be_found_is_written_as_absolute(tmp_path: Path) -> None:
    base = model(tmp_path / "work" / "base")
    out = tmp_path / "work" / "out"
    out.mkdir()
    config = {"base_model_name_or_path": "./base", "r": 4}
    assert moved_config(config, out, tmp_path / "work" / "out-pruned") == config
    assert moved_config(config, out, tmp_path / "else") == {"base_model_name_or_path": str(base), "r": 4}
    for name in ("someone/base", "/models/base", None):
        kept = {"base_model_name_or_path": name}
        assert moved_config(kept, out, tmp_path / "else") == kept


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["checkpoint-2/adapter_config.json", "checkpoint-10/adapter_config.json"], "holds 2 .* {0}/checkpoint-2, "),
        (["ensemble.json", *(f"s-{i}/adapter_config.json" for i in range(5))], "an ensemble of 5 adapters.*…, {0}/s-4"),
        (["config.json"], "is a model and no adapter"),
        ([], "give the folder of a PEFT adapter"),
    ],
)
def test_a_folder_that_is_no_adapter_says_what_is_inside(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(IVONError, match=f"has no adapter_config.json; .*{message.format(tmp_path)}"):
        read_json(tmp_path / "adapter_config.json")


def test_files_have_short_names_unless_two_share_one() -> None:
    assert file_names(["a/x", "b/y"]) == {"a/x": "x", "b/y": "y"}
    assert file_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
    assert file_names(["/my/a/x", "/my/b/x", "x"]) == {"/my/a/x": "a/x", "/my/b/x": "b/x", "x": "x"}
    assert file_names(["x", "x", "./x"]) == {"x": "x", "./x": "./x"}
