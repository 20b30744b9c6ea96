"""`ivon-post eval` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tiny import build_llama, write_chats

from axolotl_ivon.evaluation.evaluate import Evaluation, rows_of
from axolotl_ivon.evaluation.metrics import metrics
from ivon_post import cli

ROWS = ["base", "mean", "mean-pruned", "posterior", "posterior-pruned"]
METRICS = {"accuracy", "ece", "ece15", "nll", "brier", "auroc", "entropy", "expected_entropy", "mutual_information"}
METRICS |= {"aurc", "augrc", "cov_at_5risk", "risk_at_80cov", "aece"}


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter()


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=12)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)])


def test_json_holds_what_the_library_finds(adapter: Path, chats: Path, tmp_path: Path) -> None:
    shifted = write_chats(tmp_path / "shifted.jsonl", 9, seed=3)
    result = run(adapter, "--data", chats, "--data", shifted, "--samples", 3, "--tau", 0.5, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ROWS * 2
    assert [row["data"] for row in found["rows"]] == [str(chats)] * 5 + [str(shifted)] * 5
    assert found["choices"] == ["A", "B"]
    evaluation = Evaluation(adapter, [chats, shifted])
    rows = list(rows_of(tau=0.5).values())
    for row, score in zip(found["rows"], evaluation.run(rows, samples=3), strict=False):
        expected = metrics(score.of_groups(torch.tensor(evaluation.files[str(chats)])))
        assert {name: row[name] for name in expected} == expected
        assert expected.keys() >= METRICS
        assert row["se"].keys() == expected.keys()
        assert row["examples"] == 12


def test_infinite_tau_prints_the_mean(adapter: Path, chats: Path) -> None:
    result = run(adapter, "--data", chats, "--tau", "inf", "--samples", 4, "--json", "--quiet")
    rows = {row.pop("name"): row for row in json.loads(result.stdout)["rows"]}
    assert rows["posterior"] == rows["mean"]
    assert rows["posterior-pruned"] == rows["mean-pruned"]
    assert rows["mean"] != rows["base"]
    assert result.stderr == ""


def test_the_table_has_every_row_and_progress_is_on_stderr(adapter: Path, chats: Path) -> None:
    result = run(adapter, "--data", chats, "--samples", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for name in ROWS:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert sum("chats.jsonl (12)" in line for line in lines) == 1
    assert "2 draws at τ 1.0, pruning ratio 0.1" in lines[0]
    assert "evaluating" in result.stderr
    assert "evaluating" not in result.stdout


def test_generate_shows_perplexity_and_choice_does_not(adapter: Path, chats: Path) -> None:
    shown = [
        run(adapter, "--data", chats, "--rows", "mean", "--task", task, "-q").stdout for task in ("generate", "choice")
    ]
    assert " PPL " in shown[0]
    assert " PPL " not in shown[1]


def test_rows_and_limit_save_work(adapter: Path, chats: Path) -> None:
    result = run(adapter, "--data", chats, "--rows", "posterior,base", "--limit", 5, "--samples", 2, "--json")
    found = json.loads(result.stdout)["rows"]
    assert [(row["name"], row["examples"], row["samples"]) for row in found] == [("base", 5, 1), ("posterior", 5, 2)]


def test_a_recommendation_stands_for_tau_and_ratio(adapter: Path, chats: Path, tmp_path: Path) -> None:
    path = tmp_path / "recommended.json"
    path.write_text('{"tau": 0.5, "ratio": 0.3}')
    same = ["--data", chats, "--samples", 2, "--json", "-q"]
    recommended = run(adapter, *same, "--recommended", path)
    explicit = run(adapter, *same, "--tau", 0.5, "--prune-ratio", 0.3)
    assert json.loads(recommended.stdout) == json.loads(explicit.stdout)
    both = json.loads(run(adapter, *same, "--recommended", path, "--tau", 1).stdout)
    assert (both["tau"], both["prune_ratio"]) == (1.0, 0.3)


def bad_line(folder: Path) -> Path:
    (folder / "bad.jsonl").write_text('{"messages": []}\n')
    return folder / "bad.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda tmp, adapter, chats: [tmp / "nowhere", "--data", chats], "nowhere"),
        (lambda tmp, adapter, chats: [adapter, "--data", tmp / "nowhere.jsonl"], "there is no such file"),
        (lambda tmp, adapter, chats: [adapter, "--data", bad_line(tmp)], "bad.jsonl:1: no assistant message"),
        (lambda tmp, adapter, chats: [adapter, "--data", chats, "--choices", "A,C"], "is not one of --choices"),
        (lambda tmp, adapter, chats: [adapter, "--data", chats, "--choices", "A,B,Bx"], "start with the same token"),
        (lambda tmp, adapter, chats: [adapter, "--data", chats, "--tau", "0"], "tau 0.0 is not > 0"),
        (lambda tmp, adapter, chats: [adapter, "--data", chats, "--prune-ratio", "2"], "ratio 2.0 is outside"),
        (lambda tmp, adapter, chats: [adapter, "--data", chats, "--rows", "mean,median"], "'median' is unknown"),
        (lambda tmp, adapter, chats: [adapter, "--data", chats, "--device", "abacus"], "--device abacus"),
        (
            lambda tmp, adapter, chats: [
                adapter, "--data", chats, "--base-model", build_llama(tmp / "b", hidden_size=16)
            ],
            "does not fit the adapter",
        ),
        (
            lambda tmp, adapter, chats: [adapter, "--data", chats, "--recommended", tmp / "no.json"],
            "--recommended",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    tmp_path: Path, adapter: Path, chats: Path, arguments: Callable[..., list], message: str
) -> None:
    result = run(*arguments(tmp_path, adapter, chats), "--quiet")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_adapter_without_sigma_is_compared_by_its_mean(make_adapter: Callable[..., Path], chats: Path) -> None:
    plain = make_adapter(sigma=False)
    assert "--rows base,mean" in run(plain, "--data", chats, "-q").stderr
    result = run(plain, "--data", chats, "--rows", "base,mean", "--json", "-q")
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["base", "mean"]


def test_an_untrained_head_has_no_row(tmp_path: Path, tiny_llama: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    from axolotl_ivon.posterior.adapter import save_sigma

    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
    folder = tmp_path / "head"
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(folder)
    mean = load_file(folder / "adapter_model.safetensors")
    save_sigma(folder, {key: torch.full_like(value, 0.01) for key, value in mean.items()}, {})
    (tmp_path / "data.jsonl").write_text('{"text": "sun", "label": 0}\n{"text": "rain", "label": 1}\n')
    result = run(folder, "--data", tmp_path / "data.jsonl", "--samples", 2, "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ROWS[1:]
    assert "no row for the base model" in result.stderr
