"""`ivon-post eval` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Cli
from tiny import write_chats

from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.variants import paper_variants
from axolotl_ivon.metrics.scores import metrics

ROWS = ["base", "mean", "mean-pruned", "posterior", "posterior-pruned"]
METRICS = {"accuracy", "ece", "ece15", "nll", "brier", "auroc", "entropy", "expected_entropy", "mutual_information"}
METRICS |= {"aurc", "augrc", "cov_at_5risk", "risk_at_80cov", "aece"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=12)


def test_json_holds_what_the_library_finds(tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli) -> None:
    shifted = write_chats(tmp_path / "shifted.jsonl", 9, seed=3)
    found = ivon_post.json("eval", tiny_adapter, "--data", chats, "--data", shifted, "--samples", 3, "--tau", 0.5)
    assert [row["name"] for row in found["rows"]] == ROWS * 2
    assert [row["data"] for row in found["rows"]] == [str(chats)] * 5 + [str(shifted)] * 5
    assert found["choices"] == ["A", "B"]
    evaluation = Evaluation(tiny_adapter, EvaluationData([chats, shifted]))
    rows = list(paper_variants(tau=0.5).values())
    for row, score in zip(found["rows"], evaluation.run(rows, Sampling(samples=3)), strict=False):
        expected = metrics(score.of_groups(torch.tensor(evaluation.files[str(chats)])))
        assert {name: row[name] for name in expected} == expected
        assert expected.keys() >= METRICS
        assert row["se"].keys() == expected.keys()
        assert row["examples"] == 12


def test_infinite_tau_prints_the_mean(tiny_adapter: Path, chats: Path, ivon_post: Cli) -> None:
    result = ivon_post.run("eval", tiny_adapter, "--data", chats, "--tau", "inf", "--samples", 4, "--json", "--quiet")
    found = json.loads(result.stdout)
    versus = {row["name"]: row.pop("versus_mean", None) for row in found["rows"]}
    rows = {row.pop("name"): row for row in found["rows"]}
    assert rows["posterior"] == rows["mean"]
    assert rows["posterior-pruned"] == rows["mean-pruned"]
    assert rows["mean"] != rows["base"]
    assert all(value == {"difference": 0, "standard_error": 0} for value in versus["posterior"].values())
    assert versus["mean"] is None
    assert [one["verdict"] for one in found["verdicts"]] == ["too few examples", "the same"]
    assert result.stderr == ""


def test_the_table_has_every_row_and_progress_is_on_stderr(tiny_adapter: Path, chats: Path, ivon_post: Cli) -> None:
    result = ivon_post.run("eval", tiny_adapter, "--data", chats, "--samples", 2)
    lines = result.stdout.splitlines()
    for name in ROWS:  # in the tables of quality, of what is answered, and of differences
        assert sum(line.split()[:1] == [name] for line in lines) == 3
    assert sum("chats.jsonl (12)" in line for line in lines) == 3
    assert lines[-1].startswith("12 examples are too few to tell 2 draws from the mean: NLL ")
    assert "2 draws at τ 1.0, pruning ratio 0.1" in lines[0]
    assert "evaluating" in result.stderr
    assert "evaluating" not in result.stdout


def test_every_row_is_compared_with_the_mean_and_the_base(tiny_adapter: Path, chats: Path, ivon_post: Cli) -> None:
    found = ivon_post.json("eval", tiny_adapter, "--data", chats, "--samples", 2)["rows"]
    rows = {row["name"]: row for row in found}
    for name, other in ((name, other) for name in ROWS for other in ("mean", "base") if name != other):
        for metric, value in rows[name][f"versus_{other}"].items():
            assert value["difference"] == pytest.approx(rows[name][metric] - rows[other][metric])
            assert value["standard_error"] >= 0
    assert not any(f"versus_{name}" in rows[name] for name in ("mean", "base"))
    one, mirrored = rows["mean"]["versus_base"]["nll"], rows["base"]["versus_mean"]["nll"]
    assert one["difference"] == -mirrored["difference"]
    assert one["standard_error"] == pytest.approx(mirrored["standard_error"])


def test_other_data_temperatures_and_a_line_for_every_example(
    tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli
) -> None:
    other, valid = write_chats(tmp_path / "other.jsonl", 7, seed=3), write_chats(tmp_path / "valid.jsonl", 20, seed=4)
    out = tmp_path / "examples.jsonl"
    words = ["eval", tiny_adapter, "--data", chats, "--samples", 2, "--rows", "mean,posterior", "-q"]
    words += ["--ood", other, "--calibrate", valid]
    found = ivon_post.json(*words, "-o", out)
    names = ["mean", "posterior", "mean+temperature", "posterior+temperature"]
    assert [row["name"] for row in found["rows"]] == names
    temperatures = found["calibration"]["temperatures"]
    assert {row["name"]: row["temperature"] for row in found["rows"][2:]} == temperatures
    assert (found["calibration"]["data"], found["calibration"]["examples"]) == (str(valid), 20)
    assert found["rows"][2]["accuracy"] == found["rows"][0]["accuracy"]
    assert "versus_mean+temperature" in found["rows"][3]
    # Ten entries: four scores of the draws, two of every other row.
    assert [(one["name"], one["data"]) for one in found["ood"]] == [
        (name, str(other)) for name in names for _ in range(4 if name == "posterior" else 2)
    ]
    assert {"score", "auroc", "aupr", "fpr95", "se"} <= found["ood"][0].keys()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["data"] for line in lines] == [str(chats)] * 12 + [str(other)] * 7
    assert list(lines[0]["rows"]) == names
    # Without --output it is the same, and the tables show it.
    assert {**ivon_post.json(*words), "output": str(out)} == found
    shown = ivon_post(*words)
    for text in ("other.jsonl", "posterior+temperature", "max p", "cov@5 %", "Δ NLL", "fitted on", "too few to tell"):
        assert text in shown
    assert "overwrite it with --overwrite" in ivon_post.error(*words, "-o", out)
    assert ivon_post(*words, "-o", out, "--overwrite").splitlines()[-1] == str(out)


def test_rows_tasks_and_a_limit(tiny_adapter: Path, chats: Path, ivon_post: Cli) -> None:
    words = ["eval", tiny_adapter, "--data", chats, "--limit", 5, "--samples", 2, "-q"]
    rows = ivon_post.json(*words, "--rows", "posterior,base")["rows"]
    assert [(row["name"], row["examples"], row["samples"]) for row in rows] == [("base", 5, 1), ("posterior", 5, 2)]
    assert " PPL " in ivon_post(*words, "--rows", "mean", "--task", "generate")
    assert " PPL " not in ivon_post(*words, "--rows", "mean", "--task", "choice")


def test_a_recommendation_stands_for_tau_and_ratio(
    tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli
) -> None:
    path = tmp_path / "recommended.json"
    path.write_text('{"tau": 0.5, "ratio": 0.3}')
    words = ["eval", tiny_adapter, "--data", chats, "--samples", 2]
    recommended = ivon_post.json(*words, "--recommended", path)
    assert recommended == ivon_post.json(*words, "--tau", 0.5, "--ratio", 0.3)
    both = ivon_post.json(*words, "--recommended", path, "--tau", 1)
    assert (both["tau"], both["prune_ratio"]) == (1.0, 0.3)


def test_an_adapter_without_sigma_is_compared_by_its_mean(
    make_adapter: Callable[..., Path], chats: Path, ivon_post: Cli
) -> None:
    plain = make_adapter(sigma=False)
    assert "--rows base,mean" in ivon_post.error("eval", plain, "--data", chats, "-q")
    rows = ivon_post.json("eval", plain, "--data", chats, "--rows", "base,mean")["rows"]
    assert [row["name"] for row in rows] == ["base", "mean"]


def test_an_untrained_head_has_no_row(tmp_path: Path, tiny_llama: Path, ivon_post: Cli) -> None:
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
    result = ivon_post.run("eval", folder, "--data", tmp_path / "data.jsonl", "--samples", 2, "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ROWS[1:]
    assert "no row for the base model" in result.stderr
