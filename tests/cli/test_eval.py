"""`ivon-post eval` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli
from tiny import write_chats

from axolotl_ivon import Posterior
from axolotl_ivon.evaluation.evaluate import EvaluationData, Sampling
from axolotl_ivon.evaluation.run import run
from axolotl_ivon.evaluation.variants import VariantChoice

ROWS = ["base", "mean", "posterior"]
ALL_ROWS = ["base", "mean", "mean-pruned", "posterior", "posterior-pruned"]
METRICS = {"accuracy", "ece", "ece15", "nll", "brier", "auroc", "entropy", "expected_entropy", "mutual_information"}
METRICS |= {"aurc", "augrc", "cov_at_5risk", "risk_at_80cov", "aece"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=12)


def test_json_holds_what_the_library_finds(tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli) -> None:
    shifted = write_chats(tmp_path / "shifted.jsonl", 9, seed=3)
    found = ivon_post.json("eval", tiny_adapter, "--data", chats, "--data", shifted, "--samples", 3, "--tau", 0.5)
    data, choice = EvaluationData([str(chats), str(shifted)]), VariantChoice(tau=0.5)
    record = run(str(tiny_adapter), data, choice, Sampling(samples=3)).record
    assert found == json.loads(json.dumps(record.dump()))
    header = Posterior.from_pretrained(tiny_adapter).metadata
    assert [found[name] for name in ("mean_sha256", "sigma_sha256")] == [header["mean_sha256"], header["sigma_sha256"]]
    assert run(str(tiny_adapter), EvaluationData([str(chats)]), VariantChoice(["mean"])).record.sigma_sha256 is None
    assert [row["name"] for row in found["rows"]] == ROWS * 2
    assert all(row.keys() >= METRICS for row in found["rows"])


def test_infinite_tau_prints_the_mean(tiny_adapter: Path, chats: Path, ivon_post: Cli) -> None:
    words = ["--tau", "inf", "--ratio", 0.1, "--samples", 4, "--json", "--quiet"]
    result = ivon_post.run("eval", tiny_adapter, "--data", chats, *words)
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


@pytest.mark.parametrize(
    ("words", "rows", "ratio"),
    [
        ([], ROWS, ""),
        (["--ratio", 0.2], ALL_ROWS, ", pruning ratio 0.2"),
        (["--rows", ",".join(ALL_ROWS)], ALL_ROWS, ", pruning ratio 0.1"),
        (["--ratio", 0.2, "--rows", ",".join(ROWS)], ROWS, ""),
    ],
)
def test_the_table_has_every_row_and_progress_is_on_stderr(
    tiny_adapter: Path, chats: Path, ivon_post: Cli, words: list[object], rows: list[str], ratio: str
) -> None:
    result = ivon_post.run("eval", tiny_adapter, "--data", chats, "--samples", 2, *words)
    lines = result.stdout.splitlines()
    for name in ALL_ROWS:  # in the tables of quality, of what is answered, and of differences
        assert sum(line.split()[:1] == [name] for line in lines) == (3 if name in rows else 0)
    assert sum("chats.jsonl (12)" in line for line in lines) == 3
    assert lines[-1].startswith("12 examples are too few to tell 2 draws from the mean: NLL ")
    assert lines[0].rstrip().endswith(f"2 draws at τ 1{ratio}")
    assert "evaluating" in result.stderr
    assert "evaluating" not in result.stdout


def test_tau_is_said_to_come_on_top_of_the_adapter_s_own(
    tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli
) -> None:
    Posterior.from_pretrained(tiny_adapter).temper(977).save_pretrained(tmp_path / "narrow")
    words = ("--data", chats, "--samples", 2, "--tau", 0.5)
    first = ivon_post("eval", tmp_path / "narrow", *words).splitlines()[0]
    assert first.rstrip().endswith("; 2 draws at τ 0.5 (times the adapter's own 977)")
    assert ivon_post.json("eval", tmp_path / "narrow", *words)["adapter_tau"] == 977
    assert "relative to the adapter's own τ" in " ".join(ivon_post("eval", "--help").split())


def test_other_data_temperatures_and_examples(tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli) -> None:
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


def test_rows_tasks_limit_and_recommended(tiny_adapter: Path, chats: Path, tmp_path: Path, ivon_post: Cli) -> None:
    words = ["eval", tiny_adapter, "--data", chats, "--limit", 5, "--samples", 2, "-q"]
    rows = ivon_post.json(*words, "--rows", "posterior,base")["rows"]
    assert [(row["name"], row["examples"], row["samples"]) for row in rows] == [("base", 5, 1), ("posterior", 5, 2)]
    assert " PPL " in ivon_post(*words, "--rows", "mean", "--task", "generate")
    assert "; no draws" in ivon_post(*words, "--rows", "mean").splitlines()[0]
    assert " PPL " not in ivon_post(*words, "--rows", "mean", "--task", "choice")
    path = tmp_path / "recommended.json"
    path.write_text('{"tau": 0.5, "ratio": 0.3}')
    words = ["eval", tiny_adapter, "--data", chats, "--samples", 2]
    recommended = ivon_post.json(*words, "--recommended", path)
    assert recommended == ivon_post.json(*words, "--tau", 0.5, "--ratio", 0.3)
    both = ivon_post.json(*words, "--recommended", path, "--tau", 1)
    assert (both["tau"], both["prune_ratio"]) == (1.0, 0.3)
