"""What was measured, in a model card, read back by huggingface_hub: its ModelCard and its `.eval_results` entries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.inspect.card import add_results
from axolotl_ivon.posterior.card import TAGS, remove_old_results, update_card


@pytest.fixture
def folder(tiny_adapter: Path, copied: Callable[..., Path]) -> Path:
    """An adapter whose card tells of its posterior."""
    folder = copied(tiny_adapter)
    update_card(folder)
    return folder


def load(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def result_rows(accuracy: float = 0.875) -> list[dict[str, Any]]:
    common = {"data": "/some/where/test.jsonl", "examples": 40, "ece": 0.05, "nll": 0.3, "brier": 0.2, "auroc": None}
    error = {"accuracy": 0.0125, "ece": 0.01, "nll": 0.02, "brier": 0.03, "auroc": None}
    return [
        {"name": "base", "samples": 1, "accuracy": 0.5, "se": error, **common},
        {"name": "mean", "samples": 1, "accuracy": accuracy, "se": error, **common},
        {"name": "posterior", "samples": 10, "accuracy": 0.9, "se": error, **common},
    ]


@pytest.fixture
def write(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a JSON file that is of the adapter in `folder`."""

    def write(name: str = "eval.json", **changes: Any) -> Path:
        sha = Posterior.from_pretrained(folder).metadata["mean_sha256"]
        document = {"rows": result_rows(), "task": "choice", "samples": 10, "tau": 1.0, "prune_ratio": 0.1, "seed": 0}
        document |= {"mean_sha256": sha, **changes}
        (tmp_path / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
        return tmp_path / name

    return write


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_there_with_their_errors(folder: Path, write: Callable[..., Path]) -> None:
    before = files(folder)
    sweep = {"objective": "nll", "tau": 2.0, "ratio": 0.1, "data": ["valid.jsonl"], "threshold": 0.83, "risk": 0.05}
    sweep |= {"confidence": 0.9, "coverage": 0.71, "temperature": 1.25}
    sweep |= {"reported_on": {"accuracy": 0.8, "ece": 0.04, "nll": 0.5, "se": {"accuracy": 0.03}}}
    card, *yamls = add_results(folder, write(), write("recommended.json", rows=None, **sweep))
    text = card.read_text()
    for part in (
        "| test.jsonl (40) | base | 50.0 ± 1.2 | 5.0 ± 1.0 | 0.300 ± 0.020 | 0.200 ± 0.030 |",
        "|  | posterior | 90.0 ± 1.2 |",
        "by nll on valid.jsonl: draws at τ 2 with T 1.25 and pruning ratio 0.1; on",
        "NLL 0.500, accuracy 80.0 ± 3.0 %, ECE 4.0 %",
        "at least 0.830",
        "at most 5.0 % of the answers are wrong, with 90 % confidence",
        "71.0 % of it is answered",
    ):
        assert part in text
    assert "/some/where" not in text, "a folder of this machine is nobody's business"

    results = load(folder).data.eval_results
    values = {(r.metric_type, r.metric_name): r.metric_value for r in results}
    assert values["accuracy", "accuracy, mean (ivon-post eval)"] == 0.875
    assert values["nll", "nll, posterior: average over 10 draws at τ 1 (ivon-post eval)"] == 0.3
    assert {(r.task_type, r.dataset_name) for r in results} == {("multiple-choice", "test.jsonl")}

    from huggingface_hub import parse_eval_result_entries

    assert [path.name for path in yamls] == ["ivon-mean.yaml", "ivon-posterior.yaml"]
    [entry] = parse_eval_result_entries(yaml.safe_load(yamls[1].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("test", "default", 90.0)
    assert entry.notes == "accuracy in %, posterior: average over 10 draws at τ 1"
    changed = {name for name, content in files(folder).items() if content != before.get(name)}
    assert changed == {"README.md", ".eval_results/ivon-mean.yaml", ".eval_results/ivon-posterior.yaml"}


@pytest.mark.parametrize(
    ("paths", "names", "ids"),
    [
        (("/some/where/news/test.jsonl", "/some/where/film/test.jsonl"),
         ("news/test.jsonl", "film/test.jsonl"), ("news--test", "film--test")),
        (("test.jsonl", "test.json"), ("test.jsonl", "test.json"), ("test.jsonl", "test.json")),
    ],
)  # fmt: skip
def test_files_of_one_name_are_told_apart(
    paths: tuple[str, str],
    names: tuple[str, str],
    ids: tuple[str, str],
    folder: Path,
    write: Callable[..., Path],
) -> None:
    rows = [{**row, "data": path} for path in paths for row in result_rows()]
    swept = {"rows": None, "tau": "inf", "ratio": 0.0, "data": paths}
    card, *yamls = add_results(folder, write(rows=rows), write("recommended.json", **swept))
    text = card.read_text()
    assert all(f"| {name} (40) | base |" in text for name in names)
    assert f"Recommended, on {names[0]}, {names[1]}:" in text
    assert "/some/where" not in text
    assert {(r.dataset_type, r.dataset_name) for r in load(folder).data.eval_results} == {*zip(ids, names, strict=True)}
    for path in yamls:
        assert tuple(entry["dataset"]["id"] for entry in yaml.safe_load(path.read_text())) == ids


def test_the_recommendation_is_the_folder_s_own_or_the_one_that_is_given(
    folder: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    swept = {"rows": None, "tau": "inf", "ratio": 0.0}
    shutil.move(write("own.json", **swept, temperature=1.5), folder / "recommended.json")
    add_results(folder)
    assert "the mean with T 1.5" in load(folder).text
    add_results(folder, recommended=write("recommended.json", **swept, temperature=1.25))
    assert "the mean with T 1.25" in load(folder).text
    assert "T 1.5" not in load(folder).text
    Posterior.from_pretrained(folder).temper(2).save_pretrained(tmp_path / "tempered")
    assert "the mean with T" not in load(tmp_path / "tempered").text


def test_results_take_the_place_of_earlier_ones(folder: Path, write: Callable[..., Path]) -> None:
    card = load(folder)
    theirs = EvalResult("text-generation", "theirs/data", "Theirs", "accuracy", 0.7, metric_name="accuracy")
    card.data.model_name, card.data.eval_results = "Their model", [theirs]
    card.save(folder / "README.md")
    add_results(folder, write())
    first = files(folder)
    add_results(folder, write())
    assert files(folder) == first
    add_results(folder, write(rows=result_rows(0.6)[:2]), datasets=["owner/data/task"])
    data = load(folder).data
    assert data.model_name == "Their model"
    assert theirs in data.eval_results
    ours = {r.metric_value for r in data.eval_results if "(ivon-post eval)" in str(r.metric_name)}
    assert ours == {0.6, 0.05, 0.3, 0.2}
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["ivon-mean.yaml"]
    [entry] = yaml.safe_load((folder / ".eval_results" / "ivon-mean.yaml").read_text())
    assert entry["dataset"] == {"id": "owner/data", "task_id": "task"}
    assert (folder / "README.md").read_text().count("## Measured") == 1


def test_results_go_with_their_posterior(
    folder: Path, write: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """They stay in a copy, and go from a card whose posterior was changed or trained anew."""
    add_results(folder, write())
    posterior = Posterior.from_pretrained(folder)
    for name, made in {"same": posterior, "tempered": posterior.temper(4)}.items():
        made.save_pretrained(tmp_path / name)
        card = load(tmp_path / name)
        assert ("## Measured" in card.text, bool(card.data.eval_results)) == (name == "same", name == "same")
        assert not (tmp_path / name / ".eval_results").exists()
    remove_old_results(folder)
    assert (folder / ".eval_results" / "ivon-mean.yaml").exists()
    other = make_adapter(seed=3)
    for name in ("adapter_model.safetensors", "ivon_sigma.safetensors"):
        shutil.copyfile(other / name, folder / name)
    update_card(folder)
    remove_old_results(folder)
    assert "## Measured" not in (folder / "README.md").read_text()
    assert not load(folder).data.eval_results
    assert not list((folder / ".eval_results").iterdir())


def test_an_adapter_without_a_card_gets_one_and_names_are_not_obeyed(folder: Path, write: Callable[..., Path]) -> None:
    (folder / "README.md").unlink()
    add_results(folder)
    assert set(load(folder).data.tags) == set(TAGS)
    bad = "<script>|`x`\n# head.jsonl"
    add_results(folder, write(rows=[{**row, "data": bad} for row in result_rows()], task=bad))
    lines = (folder / "README.md").read_text().splitlines()
    assert not any(line.startswith("# head") for line in lines)
    assert any(r"\<script\>\|\`x\`\\n\# head.jsonl (40)" in line for line in lines)
    assert load(folder).data.eval_results[0].dataset_name == bad


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"results": {"mean_sha256": "0" * 64, "adapter": "other"}}, "results"),
        ({"results": {"rows": [{"name": "mean"}]}}, "results"),
        ({"recommended": {"rows": None, "mean_sha256": "0"}}, "recommended"),
        ({"datasets": ["a/b", "c/d"]}, "datasets"),
        ({"datasets": ["nobody"]}, "datasets"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], parameter: str, folder: Path, write: Callable[..., Path]) -> None:
    paths = {name: write(f"{name}.json", **value) for name, value in arguments.items() if isinstance(value, dict)}
    before = files(folder)
    with pytest.raises(IVONError) as error:
        add_results(folder, **{"results": write("good.json"), **arguments, **paths})
    assert error.value.parameter == parameter
    assert files(folder) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, other: shutil.rmtree(folder), "no such folder here"),
        (lambda folder, other: (folder / "ivon_sigma.safetensors").unlink(), "no posterior to describe"),
        (lambda folder, other: shutil.copy(other / "adapter_model.safetensors", folder), "belongs to another"),
        (lambda folder, other: (folder / "README.md").write_text("---\nlanguage: [en\n---\n"), "its metadata, between"),
        (lambda folder, other: (folder / "README.md").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_a_folder_that_gets_no_results(
    damage: Callable[[Path, Path], object], message: str, folder: Path, write: Callable[..., Path], make_adapter: Any
) -> None:
    results = write()
    damage(folder, make_adapter(seed=3))
    with pytest.raises(IVONError, match=message):
        add_results(folder, results)


@pytest.mark.parametrize("mark", ["<!-- ivon: end -->", "<!-- ivon results: end -->"])
def test_notes_under_a_section_without_its_end_are_not_lost(
    mark: str, folder: Path, write: Callable[..., Path]
) -> None:
    card, *_ = add_results(folder, write())
    card.write_text(card.read_text().replace(f"{mark}\n", "") + "\nMy notes.\n")
    before = files(folder)
    with pytest.raises(IVONError, match=f"has no {mark} after it; put that line back"):
        add_results(folder, write())
    assert files(folder) == before
