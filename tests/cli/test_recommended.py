"""What commands do by themselves where the adapter's own folder has a recommended.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import Cli
from pipeline import Pipeline
from safetensors.torch import load_file

from axolotl_ivon import Posterior
from axolotl_ivon.records.resumable import settings_path

MEAN = "taken from the adapter's recommended.json: the mean with T 1.5; --no-recommended leaves it out"
DRAWS = "taken from the adapter's recommended.json: draws at τ 4 with T 0.8; --no-recommended leaves it out"

Calibrated = Callable[..., Path]


def test_who_asks_for_draws_gets_the_best_ones(calibrated: Calibrated, tmp_path: Path, ivon_post: Cli) -> None:
    adapter = calibrated()
    out = tmp_path / "out"
    for words, tau, line in (
        ((), 4.0, DRAWS),
        (("-q",), 4.0, ""),
        (("--recommended", adapter / "recommended.json"), 4.0, ""),
        (("--tau", 2), 2.0, ""),
        (("--no-recommended",), 1.0, ""),
    ):
        result = ivon_post.run("sample", adapter, "-n", 2, "-o", out, "--overwrite", *words)
        assert "taken from" in result.stderr if line else "taken from" not in result.stderr
        assert not line or result.stderr.splitlines()[0] == line
        assert json.loads((out / "ensemble.json").read_text())["tau"] == tau
        first, second = ((out / f"sample-000{k}" / "adapter_model.safetensors").read_bytes() for k in (0, 1))
        assert first != second


def test_merge_takes_the_mean_with_its_t_and_of_draws_the_best(
    calibrated: Calibrated, tmp_path: Path, ivon_post: Cli
) -> None:
    adapter = calibrated()

    def merged(name: str, *words: object, source: Path = adapter) -> tuple[float, str]:
        result = ivon_post.run("merge", source, "-o", tmp_path / name, "--json", *words)
        return json.loads(result.stdout)["temperature"], result.stderr

    assert merged("mean") == (1.5, f"{MEAN}\nthe logits are divided by the softmax temperature 1.5\n")
    assert merged("plain", "--no-recommended") == (1.0, "")
    assert merged("draw", "--sample-seed", 1) == (1.0, f"{DRAWS}\n")
    merged("by hand", "--sample-seed", 1, "--tau", 4)
    draws = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("draw", "by hand")]
    assert draws[0] == draws[1]
    (adapter / "recommended.json").write_text('{"tau": 4.0, "ratio": 0.0, "temperature": 0.8}')
    line = "the adapter's recommended.json is for draws at τ 4 with T 0.8; this is the mean\n"
    assert merged("of draws") == (1.0, line)
    line = "the softmax temperature 0.8 is for draws at τ 4: the mean gets none\n"
    assert merged("given", "--recommended", adapter / "recommended.json") == (1.0, line)
    scaled, *heads = (
        load_file(tmp_path / name / "model.safetensors")["lm_head.weight"]
        for name in ("mean", "plain", "of draws", "given")
    )
    torch.testing.assert_close(scaled * 1.5, heads[0])
    assert all(torch.equal(head, heads[0]) for head in heads)


def test_eval_adds_mean_and_draws_at_their_own_temperature(
    calibrated: Calibrated, pipeline: Pipeline, tmp_path: Path, ivon_post: Cli
) -> None:
    adapter = calibrated()
    words = ["eval", adapter, "--data", pipeline.chats, "--samples", 2, "--json"]
    result = ivon_post.run(*words)
    record = json.loads(result.stdout)
    assert result.stderr.splitlines()[0] == MEAN
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["base", "mean", "posterior", "mean+temperature", "posterior+temperature"]
    for name, samples, temperature in (("mean", 1, 1.5), ("posterior", 2, 0.8)):
        plain, scaled = rows[name], rows[f"{name}+temperature"]
        assert (record["tau"], scaled["samples"], scaled["temperature"]) == (4.0, samples, temperature)
        assert scaled["accuracy"] == plain["accuracy"]
        assert scaled["nll"] != plain["nll"]
    pairs = [(verdict["name"], verdict["than"]) for verdict in record["verdicts"]]
    scaled = [("mean+temperature", "mean"), ("posterior+temperature", "mean+temperature")]
    assert pairs == [("mean", "base"), ("posterior", "mean"), *scaled]
    given = json.loads(ivon_post.run(*words, "--recommended", adapter / "recommended.json").stdout)
    assert given == record
    for own, tau in ((["--tau", 2], 2.0), (["--no-recommended"], 1.0)):
        record = json.loads(ivon_post.run(*words, *own).stdout)
        assert ([row["name"] for row in record["rows"]], record["tau"]) == (["base", "mean", "posterior"], tau)
    record = json.loads(ivon_post.run(*words, "--rows", "posterior,mean").stdout)
    assert ([row["name"] for row in record["rows"]], record["tau"]) == (["mean", "posterior"], 4.0)
    result = ivon_post.run(*words, "--rows", "mean,mean+temperature")
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["mean", "mean+temperature"]
    assert result.stderr.splitlines()[0] == MEAN
    plain = ivon_post.run(*words, "--rows", "base,mean").stderr
    assert "taken from" not in plain, "of these rows nothing is recommended"
    wrong = ivon_post.run(*words, "--rows", "mean+t").stderr.splitlines()[-1]
    assert "'mean+t' is unknown; choose from base,mean," in wrong
    assert wrong.endswith("mean+temperature,posterior+temperature,recommended")
    report = ivon_post.run("report", adapter, "--data", pipeline.chats, "-o", tmp_path / "page.html")
    assert report.stderr.splitlines()[0] == MEAN
    page = (tmp_path / "page.html").read_text()
    assert ">mean+temperature<" in page.replace("\n", "").replace(" ", "")
    # What it says of draws is said of draws, not of a posterior at τ = ∞ that is the mean.
    assert "On chats.jsonl, draws at τ 4: " in page
    assert "predict the same" not in page
    assert "Recommended, on validation data: the mean with T 1.5." in page


def test_generate_takes_the_mean_unless_draws_are_asked_for(
    calibrated: Calibrated, pipeline: Pipeline, tmp_path: Path, ivon_post: Cli
) -> None:
    adapter = calibrated()

    def source(*words: object) -> dict[str, Any]:
        out = tmp_path / "out.jsonl"
        common = ("-n", 4, "--max-tokens", 2, "--limit", 2, "-o", out, "--overwrite")
        result = ivon_post.run("generate", adapter, "-p", pipeline.chats, *common, *words)
        settings = json.loads((settings_path(out)).read_text())
        members = {o["member"] for line in out.read_text().splitlines() for o in json.loads(line)["outputs"]}
        notes = [line for line in result.stderr.splitlines() if line.startswith("taken")]
        return {"tau": settings["tau"], "members": len(members), "notes": notes}

    mean = {"tau": "inf", "members": 1}
    assert source() == {**mean, "notes": [MEAN]}
    assert source("--mean") == {**mean, "notes": [MEAN]}
    assert source("--per-model", 2) == {"tau": 4.0, "members": 2, "notes": [DRAWS]}
    assert source("--per-model", 2, "--no-recommended") == {"tau": 1.0, "members": 2, "notes": []}
    assert source("--per-model", 2, "--tau", 3) == {"tau": 3.0, "members": 2, "notes": []}


def test_what_changes_an_adapter_neither_takes_the_file_nor_passes_it_on(
    calibrated: Calibrated, other_adapter: Path, tmp_path: Path, ivon_post: Cli
) -> None:
    adapter = calibrated(ratio=0.5, tau=9.0)

    def made(name: str, *words: object) -> Path:
        result = ivon_post.done(*words, "-o", tmp_path / name)
        assert "taken from" not in result.stderr
        assert not list((tmp_path / name).rglob("recommended.json"))
        return tmp_path / name

    made("combined", "combine", adapter, other_adapter)
    pruned, tempered = made("pruned", "prune", adapter), made("tempered", "temper", adapter, "--tau", 2)
    assert Posterior.from_pretrained(pruned).pruned_ratio == 0.1
    # Nothing is beside them, so nothing is taken: τ = 2 stays, and the share of 0.1.
    for source, tau in ((pruned, 1.0), (tempered, 2.0)):
        for words, expected in (((), tau), (("--recommended", adapter / "recommended.json"), 9.0)):
            ensemble = made("ensemble", "sample", source, "-n", 1, "--overwrite", *words)
            assert json.loads((ensemble / "ensemble.json").read_text())["tau"] == expected


def test_a_sweep_may_replace_the_file_in_the_adapter_s_own_folder(
    calibrated: Calibrated, pipeline: Pipeline, ivon_post: Cli
) -> None:
    adapter = calibrated()
    words = ["sweep", adapter, "--data", pipeline.chats, "--tau", "2,inf", "--ratio", 0, "-n", 2, "-o", adapter]
    assert "--overwrite" in ivon_post.error(*words, "-q")
    before = Posterior.from_pretrained(adapter)
    result = ivon_post.run(*words, "--overwrite")
    assert result.stderr.splitlines()[-1] == f"next: ivon-post eval {adapter} --data TEST.jsonl"
    swept = json.loads((adapter / "recommended.json").read_text())
    assert swept["draws"]["tau"] == 2.0
    assert Posterior.from_pretrained(adapter).metadata == before.metadata
    assert ivon_post.json("info", adapter)["recommended"].startswith("the mean")


def test_info_uses_nothing_of_a_file_of_another_adapter(calibrated: Calibrated, ivon_post: Cli) -> None:
    shown = ivon_post.run("info", calibrated(mean_sha256="c" * 64), "--json")
    assert json.loads(shown.stdout)["recommended"] is None
    assert "was chosen for another adapter" in shown.stderr


def test_a_card_may_be_without_a_recommendation(calibrated: Calibrated, ivon_post: Cli) -> None:
    card = calibrated() / "README.md"
    for words, there in ((), True), (("--no-recommended",), False):
        ivon_post("card", card.parent, *words)
        assert ("the mean with T 1.5" in card.read_text()) is there
