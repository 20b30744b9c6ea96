"""Model cards, read back by huggingface_hub: its ModelCard, its EvalResult and its `.eval_results` entries."""

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
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.card import add_results, describe, remove_old_results, section, update_card
from axolotl_ivon.posterior.sample import EnsemblePlan, sample

TAGS = {"ivon", "bayesian", "uncertainty"}
METADATA = {"ess": "27386.1", "gamma": "5000.0", "train_size": "30", "beta2": "0.9995", "steps": "6", "tau": "1.0"}
CONFIG = {"base_model_name_or_path": "someone/base"}


@pytest.fixture
def folder(tiny_adapter: Path, copied: Callable[..., Path]) -> Path:
    """An adapter with PEFT's card, in which somebody wrote, and what was told of the posterior after training."""
    folder = copied(tiny_adapter)
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    card.data.license, card.text = "mit", card.text + "\nSomebody's own words.\n"
    card.save(folder / "README.md")
    update_card(folder)
    return folder


def load(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def result_rows(accuracy: float = 0.875) -> list[dict[str, Any]]:
    common = {"data": "/home/me/test.jsonl", "examples": 40, "ece": 0.05, "nll": 0.3, "brier": 0.2, "auroc": None}
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
        facts = {"rows": result_rows(), "task": "choice", "samples": 10, "tau": 1.0, "prune_ratio": 0.1, "seed": 0}
        facts |= {"mean_sha256": sha, **changes}
        (tmp_path / name).write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
        return tmp_path / name

    return write


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_card_keeps_what_others_wrote(folder: Path, tiny_adapter: Path) -> None:
    before, after = ModelCard.load(tiny_adapter / "README.md"), load(folder)
    assert set(after.data.tags) == {*(before.data.tags or ()), *TAGS}
    assert after.data.license == "mit"
    changed = {"tags", "license"}
    kept = [{k: v for k, v in card.data.to_dict().items() if k not in changed} for card in (before, after)]
    assert kept[0] == kept[1]
    assert after.text.startswith(before.text.rstrip())
    assert "Somebody's own words." in after.text
    for fact in (
        "| effective sample size λ | 1,000 |",
        "| prior | empirical |",
        "| steps | 10 |",
        "| γ, of λ = γ·√N | 100 |",
    ):
        assert fact in after.text
    assert "β2 remembers 2,000 steps and the run had 10" in after.text
    for way in ("AutoPeftModelForCausalLM.from_pretrained", "posterior.sample(seed=0)", "--serve vllm"):
        assert way in after.text


def test_a_second_time_changes_nothing(folder: Path) -> None:
    before, stamp = files(folder), (folder / "README.md").stat().st_mtime_ns
    update_card(folder)
    assert files(folder) == before
    assert (folder / "README.md").stat().st_mtime_ns == stamp


@given(
    st.text(max_size=200),
    st.sampled_from(
        ["", "---\nlanguage: en\n---\n", "---\r\ntags: x\r\n---\r\n", "---\n", "---\ntags: 1\nmodel-index: [3]\n---\n"]
    ),
)
def test_any_text_is_kept_around_the_section(text: str, front: str) -> None:
    once = describe(front + text, METADATA, CONFIG)
    assert describe(once, METADATA, CONFIG) == once
    assert section(METADATA, CONFIG) in once
    assert text.strip().partition("---")[0].rstrip() in once
    other = describe(once, {**METADATA, "tau": "2.0"}, CONFIG)
    assert describe(other, METADATA, CONFIG) == once


def test_results_are_there_with_their_errors(folder: Path, write: Callable[..., Path]) -> None:
    sweep = {"objective": "nll", "tau": 2.0, "ratio": 0.1, "data": ["valid.jsonl"], "threshold": 0.83, "risk": 0.05}
    sweep |= {"confidence": 0.9, "coverage": 0.71, "temperature": 1.25}
    sweep |= {"reported_on": {"accuracy": 0.8, "ece": 0.04, "nll": 0.5, "se": {"accuracy": 0.03}}}
    card, *yamls = add_results(folder, write(), write("recommended.json", rows=None, **sweep))
    text = card.read_text()
    assert "| test.jsonl (40) | base | 50.0 ± 1.2 | 5.0 ± 1.0 | 0.300 ± 0.020 | 0.200 ± 0.030 |" in text
    assert "|  | posterior | 90.0 ± 1.2 |" in text
    assert "/home/me" not in text, "a folder of this machine is nobody's business"
    assert "by nll on valid.jsonl: τ 2.0, pruning ratio 0.1, the output at temperature 1.250" in text
    assert "accuracy 80.0 ± 3.0 %, ECE 4.0 %, NLL 0.500" in text
    assert "at least 0.830" in text
    assert "at most 5.0 % of the answers are wrong, promised with confidence 90 %" in text
    assert "it answers 71.0 %" in text

    data = load(folder).data
    assert data.license == "mit"
    found = {(r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert found["accuracy", "accuracy, mean (ivon-post eval)"] == 0.875
    assert found["nll", "nll, posterior: average over 10 draws at τ 1.0 (ivon-post eval)"] == 0.3
    assert {(r.task_type, r.dataset_name) for r in data.eval_results} == {("multiple-choice", "test.jsonl")}

    from huggingface_hub import parse_eval_result_entries

    assert [path.name for path in yamls] == ["ivon-mean.yaml", "ivon-posterior.yaml"]
    [entry] = parse_eval_result_entries(yaml.safe_load(yamls[1].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("test", "default", 90.0)
    assert entry.notes == "accuracy in %, posterior: average over 10 draws at τ 1.0"


def test_results_take_the_place_of_earlier_ones(folder: Path, write: Callable[..., Path]) -> None:
    card = load(folder)
    own = EvalResult("text-generation", "theirs/data", "Theirs", "accuracy", 0.7, metric_name="accuracy")
    card.data.model_name, card.data.eval_results = "Their model", [own]
    card.save(folder / "README.md")
    add_results(folder, write())
    first = files(folder)
    add_results(folder, write())
    assert files(folder) == first
    add_results(folder, write(rows=result_rows(0.6)[:2]), datasets=["owner/data/task"])
    data = load(folder).data
    assert data.model_name == "Their model"
    assert own in data.eval_results
    theirs = {r.metric_value for r in data.eval_results if "(ivon-post eval)" in str(r.metric_name)}
    assert theirs == {0.6, 0.05, 0.3, 0.2}
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["ivon-mean.yaml"]
    [entry] = yaml.safe_load((folder / ".eval_results" / "ivon-mean.yaml").read_text())
    assert entry["dataset"] == {"id": "owner/data", "task_id": "task"}
    assert (folder / "README.md").read_text().count("## Measured") == 1


def test_only_the_card_and_its_results_are_written(folder: Path, write: Callable[..., Path]) -> None:
    before = files(folder)
    add_results(folder, write())
    after = files(folder)
    new = {".eval_results/ivon-mean.yaml", ".eval_results/ivon-posterior.yaml"}
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", *new}


def test_what_is_made_of_an_adapter_has_a_card_that_is_true(
    folder: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    add_results(folder, write())
    posterior = Posterior.from_pretrained(folder)
    made = {
        "same": (posterior, "| share of weights pruned | 0 |", True),
        "pruned": (posterior.prune(0.25), "| share of weights pruned | 0.25 |", False),
        "tempered": (posterior.temper(4), "temperature τ, by which σ is divided as √τ | 4 |", False),
        "both": (Posterior.combine([posterior, posterior.prune(0.25)]), "| combined | precision of 2 |", False),
    }
    for name, (changed, fact, measured) in made.items():
        changed.save_pretrained(tmp_path / name)
        card = load(tmp_path / name)
        assert fact in card.text
        assert card.text.count("## Posterior") == 1
        assert "Somebody's own words." in card.text
        assert set(card.data.tags) >= TAGS
        assert ("## Measured" in card.text) == measured
        assert bool(card.data.eval_results) == measured
        assert not (tmp_path / name / ".eval_results").exists()
        update_card(tmp_path / name)
        assert load(tmp_path / name).text == card.text
    assert "the rest of this card is that of the first" in load(tmp_path / "both").text
    assert "| effective sample size λ | 2,000 |" in load(tmp_path / "both").text
    assert "It was changed after training" not in load(tmp_path / "same").text
    for member in sample(posterior, tmp_path / "ensemble", EnsemblePlan(2)):
        assert not (tmp_path / "ensemble" / member / "README.md").exists()


def test_a_mean_that_was_changed_loses_the_results_of_others_too(folder: Path, tmp_path: Path) -> None:
    card = load(folder)
    card.data.model_name = "x"
    card.data.eval_results = [EvalResult("text-generation", "theirs/data", "Theirs", "accuracy", 0.7)]
    card.save(folder / "README.md")
    posterior = Posterior.from_pretrained(folder)
    posterior.temper(2).save_pretrained(tmp_path / "tempered")
    posterior.prune(0.5).save_pretrained(tmp_path / "pruned")
    assert load(tmp_path / "tempered").data.eval_results == card.data.eval_results
    assert not load(tmp_path / "pruned").data.eval_results


def test_training_anew_in_a_folder_drops_the_results(
    folder: Path, write: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    add_results(folder, write())
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


def test_a_card_without_a_section_goes_along_as_it_is(tiny_adapter: Path, tmp_path: Path) -> None:
    Posterior.from_pretrained(tiny_adapter).prune(0.5).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == (tiny_adapter / "README.md").read_bytes()


def test_an_adapter_without_a_card_gets_one(folder: Path) -> None:
    (folder / "README.md").unlink()
    add_results(folder)
    assert set(load(folder).data.tags) == TAGS


def test_names_are_shown_and_not_obeyed(folder: Path, write: Callable[..., Path]) -> None:
    bad = "<script>|`x`\n# head.jsonl"
    add_results(folder, write(rows=[{**row, "data": bad} for row in result_rows()], task=bad))
    lines = (folder / "README.md").read_text().splitlines()
    assert not any(line.startswith("# head") for line in lines)
    assert any(r"\<script\>\|\`x\`\\n\# head.jsonl (40)" in line for line in lines)
    assert load(folder).data.eval_results[0].dataset_name == bad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_sha256": "0" * 64, "adapter": "other"}, "is of another adapter, other (mean_sha256 differs)"),
        ({"mean_sha256": None}, "does not say of which adapter it is (mean_sha256)"),
        ({"rows": None}, "has no `rows`; `ivon-post eval --json` writes it"),
        ({"rows": [{"name": "mean"}]}, "its `rows` are not those of"),
        ({"rows": []}, "its `rows` are not those of"),
    ],
)
def test_results_that_are_not_this_adapters_are_refused(
    folder: Path, write: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    path, before = write(**changes), files(folder)
    with pytest.raises(IVONError) as error:
        add_results(folder, path)
    assert message in str(error.value)
    assert error.value.parameter == "results"
    assert files(folder) == before


def test_bad_input_is_told(
    folder: Path, write: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    path, other = write(), write("recommended.json", rows=None, mean_sha256="0")
    before = files(folder)
    for arguments, message in [
        ((folder, tmp_path / "none.json"), "results cannot be read"),
        ((folder, None, other), "recommended .* is of another adapter"),
        ((folder, path, None, ["a/b", "c/d"]), "datasets: 2 for 1 data files"),
        ((folder, path, None, ["nobody"]), "datasets nobody: give owner/name"),
        ((tmp_path / "owner",), "no such folder here"),
    ]:
        with pytest.raises(IVONError, match=message):
            add_results(*arguments)
    assert files(folder) == before
    other_mean = make_adapter(seed=3) / "adapter_model.safetensors"
    for name, change, message in [
        ("ivon_sigma.safetensors", Path.unlink, "no posterior to tell of"),
        ("adapter_model.safetensors", lambda path: shutil.copyfile(other_mean, path), "belongs to another"),
    ]:
        kept = (folder / name).read_bytes()
        change(folder / name)
        with pytest.raises(IVONError, match=message):
            add_results(folder, path)
        (folder / name).write_bytes(kept)
    (folder / "README.md").write_text("---\nlanguage: [en\n---\ntext")
    with pytest.raises(IVONError, match="its metadata, between the lines ---, cannot be read"):
        add_results(folder, path)
    Posterior.from_pretrained(folder).prune(0.5).save_pretrained(tmp_path / "pruned")
    assert (tmp_path / "pruned" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(b"\xff")
    with pytest.raises(IVONError, match="cannot be read"):
        add_results(folder, path)
